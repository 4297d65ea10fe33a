"""Labels that come later, joined to what the model answered by the request's id.

A caller that will know the truth gives its requests an id, and hands in id and label once it does.
The pairs fill windows of their own: the model's real performance against that on the test split,
judged as traffic is, and the stream of its errors for a change of what is right (concept drift).

A label counts once: its answer is forgotten with it. Answers wait in the store, the newest
`store.MAX_PREDICTIONS` of them; a label for an older one is reported as unknown.
"""

import csv
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from minga.inference.errors import MonitorError
from minga.inference.monitor.alarms import Alarm
from minga.inference.monitor.estimates import Performance, measured, measured_error
from minga.inference.monitor.judgement import AlarmKind, Streak, loss_of, with_significance
from minga.inference.monitor.keeper import Windows, close_window
from minga.inference.monitor.reference import AnswerKind, Reference, Role
from minga.inference.monitor.store import Prediction, Store, Watched
from minga.inference.monitor.summary import write_findings

LABELS: Final = "labels"
CHANGE_LEVEL: Final = 0.002
"""Confidence at which ADWIN calls a stream of errors changed: its authors' delta."""

_CHUNK: Final = 1000

FindChange = Callable[[Sequence[float]], int | None]
"""From a stream of errors to the place after which it has changed; None if it has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """What turned out to be right.

    Attributes:
        request: the id that the request had.
        place: which of its rows, from 0.
        value: 0 or 1, the class's number, or the number.
    """

    request: str
    place: int
    value: float


@dataclass(slots=True, kw_only=True)
class Joined:
    """What became of labels.

    Attributes:
        joined: how many found their answers.
        unknown: how many did not: never answered with that id, labelled before, or too long ago.
        windows: how many windows were full with them.
        performance: of the newest full window.
        alarms: that were raised or cleared.
    """

    joined: int = 0
    unknown: int = 0
    windows: int = 0
    performance: tuple[Performance, ...] = ()
    alarms: list[Alarm] = field(default_factory=list)


def read_labels(file: Path) -> Iterator[Label]:
    """Read a CSV file with the columns `id`, `label` and, for requests of several rows, `row`.

    Raises:
        MonitorError: it cannot be read, or a line is none of a label.
    """
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = {"id", "label"} - set(reader.fieldnames or ())
            if missing:
                raise MonitorError(
                    f"{file} has no column {' and no '.join(sorted(missing))}; "
                    "its first line should be: id,label or id,row,label"
                )
            for row in reader:
                yield _label(file, reader.line_num, row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MonitorError(f"{file} cannot be read as CSV: {error}") from error


def _label(file: Path, line: int, row: dict[str, Any]) -> Label:
    try:
        value, place = float(row["label"]), int(row.get("row") or 0)
    except (TypeError, ValueError):
        value, place = math.nan, -1
    if not row["id"] or place < 0 or not math.isfinite(value):
        raise MonitorError(
            f"{file}, line {line}: a label is an id, a number, and the row's number from 0 if "
            f"there is one, not {dict(row)!r:.120}"
        )
    return Label(request=row["id"], place=place, value=value)


class LabelDesk:
    """Takes labels for one model; its versions are told apart by their answers.

    Args:
        store: of the monitor that watched the model.
        model: the model's name.
        windows: when a window of labels is full.
        find_change: looks for concept drift; None leaves that out.
        clock: seconds since 1970.

    Raises:
        MonitorError: the model was never watched.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        windows: Windows | None = None,
        *,
        find_change: FindChange | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        known = sorted({state.model for state in store.watched()})
        if model not in known:
            raise MonitorError(
                f"model '{model}' was never watched here, only: {', '.join(known) or 'none'}"
            )
        self._store = store
        self._model = model
        self._windows = windows or Windows()
        self._find_change = find_change
        self._clock = clock

    def take(self, labels: Iterable[Label]) -> Joined:
        """Join labels to their answers, and judge windows that are full with them.

        Labels are taken in chunks, each wholly or not at all; after an error the same labels may
        come again.

        Raises:
            MonitorError: a label is none that the model could have answered.
        """
        report = Joined()
        chunk: list[Label] = []
        for label in labels:
            chunk.append(label)
            if len(chunk) == _CHUNK:
                self._take_chunk(chunk, report)
                chunk = []
        self._take_chunk(chunk, report)
        return report

    def _take_chunk(self, labels: Sequence[Label], report: Joined) -> None:
        with self._store.transaction():
            pairs: dict[str, list[tuple[Prediction, float]]] = {}
            for label in labels:
                found = self._store.take_prediction(self._model, label.request, label.place)
                if found is None:
                    report.unknown += 1
                else:
                    version, prediction = found
                    pairs.setdefault(version, []).append((prediction, label.value))
                    report.joined += 1
            for version, joined in pairs.items():
                self._take_pairs(version, joined, report)

    def _take_pairs(
        self, version: str, pairs: Sequence[tuple[Prediction, float]], report: Joined
    ) -> None:
        state, reference = self._state(version)
        if reference.answers is None:
            raise MonitorError(
                f"model '{self._model}' version {version}: it is not known how its answers are "
                "judged; give its Task `probabilities` if it answers classes, and train again"
            )
        errors = []
        for prediction, value in pairs:
            _check_label(reference, value)
            errors.append(_error(reference, prediction, value))
            state = replace(state, began=state.began or self._clock())
            state = replace(state, open=_added(reference, state.open, prediction, value))
            if state.open["rows"] >= self._windows.rows:
                state = self._close(state, reference, report)
        self._store.put(self._look_for_change(state, errors, report))

    def _state(self, version: str) -> tuple[Watched, Reference]:
        traffic = self._store.state(self._model, version, "traffic")
        assert traffic is not None, "a prediction is kept with its traffic"
        reference = self._store.reference(traffic.reference)
        assert reference is not None, "a reference is kept with its traffic"
        found = self._store.state(self._model, version, LABELS)
        if found is not None and found.reference == traffic.reference:
            return found, reference
        number = found.number if found else 1
        state = replace(traffic, source=LABELS, began=None, open={}, number=number, streaks={})
        return state, reference

    def _close(self, state: Watched, reference: Reference, report: Joined) -> Watched:
        report.performance = _performance(reference, state.open)
        findings = with_significance(
            loss_of(AlarmKind.PERFORMANCE, one) for one in report.performance
        )
        measures = {one.metric: [one.value, one.reference] for one in report.performance}
        report.alarms += close_window(
            self._store,
            state,
            findings=findings,
            rows=state.open["rows"],
            judgement={"findings": write_findings(findings), "measures": measures},
            now=self._clock(),
        )
        report.windows += 1
        after = self._store.state(state.model, state.version, LABELS)
        assert after is not None, "it was just kept"
        return after

    def _look_for_change(self, state: Watched, errors: Sequence[float], report: Joined) -> Watched:
        """Raise an alarm if the errors have changed, which stands as long as the version does."""
        stream = self._store.add_errors(state.model, state.version, errors)
        place = self._find_change(stream) if self._find_change else None
        if place is None:
            return state
        before, after = np.mean(stream[:place]), np.mean(stream[place:])
        self._store.forget_errors(state.model, state.version, place)
        if after <= before:
            return state  # fewer errors are a change, but none to alarm anybody
        now = self._clock()
        alarm = Alarm(
            at=now,
            model=state.model,
            version=state.version,
            kind=AlarmKind.CONCEPT_DRIFT,
            subject="errors",
            is_raised=True,
            window=state.number,
            since=state.began or now,
            until=now,
            rows=len(stream) - place,
            statistic="adwin",
            value=float(after),
            limit=float(before),
            p_value=CHANGE_LEVEL,
        )
        report.alarms.append(self._store.append(alarm))
        streak = Streak(is_raised=True, since=alarm.since)
        key = (alarm.kind.value, alarm.subject)
        return replace(state, streaks={**state.streaks, key: streak})


def _check_label(reference: Reference, value: float) -> None:
    answers = reference.answers
    assert answers is not None, "its caller has looked"
    if answers.kind is AnswerKind.YES_NO and value not in (0, 1):
        raise MonitorError(f"the model answers yes or no; a label is 1 or 0, not {value:g}")
    if answers.kind is AnswerKind.CLASS and (value < 0 or value != round(value)):
        raise MonitorError(f"the model answers a class; a label is its number, not {value:g}")


def _error(reference: Reference, prediction: Prediction, value: float) -> float:
    """Give 0 or 1 for a right or wrong class, or how far a number is off."""
    answers = reference.answers
    assert answers is not None, "its caller has looked"
    if answers.kind is AnswerKind.NUMBER:
        return abs(prediction.answer - value)
    if answers.kind is AnswerKind.CLASS:
        return float(prediction.answer != value)
    is_yes = _bin(reference, prediction.score) >= answers.cut
    return float(is_yes != bool(value))


def _bin(reference: Reference, score: float) -> int:
    column = reference.only(Role.SCORE)
    assert column is not None, "a reference with rates has scores"
    return int(np.searchsorted(column.edge_array, score, side="right"))


def _added(
    reference: Reference, content: dict[str, Any], prediction: Prediction, value: float
) -> dict[str, Any]:
    """Add an answer and its label to a window of labels."""
    answers = reference.answers
    assert answers is not None, "its caller has looked"
    rows = content.get("rows", 0) + 1
    if answers.kind is AnswerKind.NUMBER:
        error = _error(reference, prediction, value)
        return {"rows": rows, "errors": [*content.get("errors", ()), error]}
    cells = [list(cell) for cell in content.get("cells", ())] or [[0, 0] for _ in answers.rates]
    is_yes = bool(value) if answers.kind is AnswerKind.YES_NO else prediction.answer == value
    cells[_bin(reference, prediction.score)][0 if is_yes else 1] += 1
    return {"rows": rows, "cells": cells}


def _performance(reference: Reference, content: dict[str, Any]) -> tuple[Performance, ...]:
    if "errors" in content:
        return measured_error(reference, np.asarray(content["errors"]))
    return measured(reference, np.asarray(content["cells"], np.int64))
