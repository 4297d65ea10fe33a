"""Joins the traffic of all replicas into windows, has full ones judged, and keeps all of it.

A window is full when it has `window_rows` rows, or is `window_s` old and has `min_rows`: fewer tell
nothing, so it stays open until they have come. What arrives is added as a whole, so windows of busy
models are larger than `window_rows`; the judgement is calibrated for whatever size there is.

The open window is on the disk with every call, so a restart goes on with it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from minga.inference.monitor.alarms import Alarm, OnAlarm
from minga.inference.monitor.judgement import Finding, Key, Streak, follow, judge
from minga.inference.monitor.sketch import Sketch
from minga.inference.monitor.store import Store, Watched, WindowRow
from minga.inference.monitor.summary import ModelSummary, summarise, write_judgement
from minga.inference.monitor.traffic import Traffic

TRAFFIC: Final = "traffic"
LOOK_EVERY_S: Final = 10.0
"""How often it is looked for windows that have become old, and for labels of other processes."""

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """When a window is full.

    Attributes:
        rows: with so many rows.
        seconds: or at this age, if it has the fewest that tell something.
        min_rows: which are so many.
    """

    rows: int = 500
    seconds: float = 3600.0
    min_rows: int = 50


def log_alarm(alarm: Alarm) -> None:
    """Write an alarm into the process's log."""
    _LOG.log(logging.WARNING if alarm.is_raised else logging.INFO, "%s", alarm)


class Keeper:
    """A `Sink` that judges in this process.

    Args:
        folder: where everything is kept; one keeper per folder.
        windows: when a window is full.
        on_alarm: hears of each alarm, after it is in the log.
        clock: seconds since 1970.

    Raises:
        MonitorError: the folder cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        windows: Windows | None = None,
        *,
        on_alarm: OnAlarm = log_alarm,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = Store(folder)
        self._windows = windows or Windows()
        self._on_alarm = on_alarm
        self._clock = clock
        self._summaries: Sequence[ModelSummary] = summarise(self._store)
        self._looked_at = clock()
        self._has_closed = False

    def close(self) -> None:
        """Close the store; what was taken is in it."""
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, traffic: Sequence[Traffic]) -> Sequence[ModelSummary]:
        """See `Sink.take`."""
        alarms: list[Alarm] = []
        is_due = self._clock() - self._looked_at >= LOOK_EVERY_S
        with self._store.transaction():
            for one in traffic:
                self._store.keep_reference(one.reference)
                self._store.keep_predictions(one.model, one.version, one.predictions)
                alarms += self._add(one)
            if is_due:
                alarms += self._close_old()
        if is_due or self._has_closed:
            self._summaries = summarise(self._store)
            self._looked_at, self._has_closed = self._clock(), False
        for alarm in alarms:
            self._on_alarm(alarm)
        return self._summaries

    def _add(self, traffic: Traffic) -> Sequence[Alarm]:
        state = self._state(traffic)
        sketch = traffic.sketch
        if state.open:
            sketch = Sketch.from_json(traffic.reference, state.open)
            sketch.merge(traffic.sketch)
        began = traffic.began if state.began is None else state.began
        return self._settle(replace(state, began=began, open=sketch.to_json()), sketch)

    def _state(self, traffic: Traffic) -> Watched:
        """Give the state of a version; a new one if it is compared with something else now."""
        found = self._store.state(traffic.model, traffic.version, TRAFFIC)
        digest = traffic.reference.digest
        if found is not None and found.reference == digest:
            return found
        return Watched(
            model=traffic.model,
            version=traffic.version,
            source=TRAFFIC,
            reference=digest,
            began=None,
            open={},
            number=found.number if found else 1,
            streaks={},
        )

    def _close_old(self) -> Sequence[Alarm]:
        """Judge windows that have become old, perhaps since nothing came any more."""
        alarms: list[Alarm] = []
        for state in self._store.watched():
            if state.source == TRAFFIC and state.open and self._is_full(state, state.open["rows"]):
                reference = self._store.reference(state.reference)
                assert reference is not None, "it is kept with the first traffic"
                alarms += self._settle(state, Sketch.from_json(reference, state.open))
        return alarms

    def _is_full(self, state: Watched, num_rows: int) -> bool:
        if num_rows >= self._windows.rows:
            return True
        began = self._clock() if state.began is None else state.began
        is_old = self._clock() - began >= self._windows.seconds
        return is_old and num_rows >= self._windows.min_rows

    def _settle(self, state: Watched, sketch: Sketch) -> Sequence[Alarm]:
        """Keep a window as it is now, judged if it is full."""
        if not self._is_full(state, sketch.rows):
            self._store.put(state)
            return ()
        judgement = judge(sketch)
        self._has_closed = True
        return close_window(
            self._store,
            state,
            findings=judgement.findings,
            rows=sketch.rows,
            judgement=write_judgement(judgement),
            now=self._clock(),
        )


def close_window(
    store: Store,
    state: Watched,
    *,
    findings: Sequence[Finding],
    rows: int,
    judgement: dict[str, object],
    now: float,
) -> Sequence[Alarm]:
    """Keep a full window with what came of it, and give its alarms as they are in the log.

    Args:
        store: where.
        state: with the window's content as the open one.
        findings: of the window.
        rows: how many it has.
        judgement: what is kept of the judgement.
        now: in seconds since 1970.
    """
    began = now if state.began is None else state.began
    streaks, changes = follow(state.streaks, findings, since=began)
    window = WindowRow(
        model=state.model,
        version=state.version,
        source=state.source,
        number=state.number,
        began=began,
        ended=now,
        rows=rows,
        content=state.open,
        judgement=judgement,
    )
    alarms = [_alarm(window, finding, streak) for finding, streak in changes]
    return store.close_window(window, _next(state, streaks), alarms)


def _next(state: Watched, streaks: dict[Key, Streak]) -> Watched:
    return replace(state, began=None, open={}, number=state.number + 1, streaks=streaks)


def _alarm(window: WindowRow, finding: Finding, streak: Streak) -> Alarm:
    return Alarm(
        at=window.ended,
        model=window.model,
        version=window.version,
        kind=finding.kind,
        subject=finding.subject,
        is_raised=streak.is_raised,
        window=window.number,
        since=streak.since,
        until=window.ended,
        rows=window.rows,
        statistic=finding.statistic,
        value=finding.value,
        limit=finding.limit,
        p_value=finding.p_value,
    )
