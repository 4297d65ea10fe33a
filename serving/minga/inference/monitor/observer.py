"""Takes requests off the request path, at the price of putting three references into a queue.

The event loop appends to a queue of bounded bytes and never waits: what does not fit is dropped
and counted. A thread looks each `flush_s`, joins the rows of each version into one table, counts
them into a sketch and hands that to a sink. It looks at `MAX_CELLS` values of a version each time
at most; of more it takes every second, third, ... row, and counts the others as not looked at. Of
a version that got more the last time, only each second, third, ... request without an id is queued
in the first place. So the cost is bounded however many requests come, and windows see rows from the
whole time.

An error of the monitor is logged once and never reaches a caller. Sketches that the sink does not
take are kept and added to the next ones.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from minga.inference.engine import OnnxModel
from minga.inference.errors import MonitorError
from minga.inference.monitor.reference import Reference
from minga.inference.monitor.sketch import Sketch, scores_of
from minga.inference.monitor.store import Prediction
from minga.inference.monitor.summary import ModelSummary
from minga.inference.monitor.traffic import Sink, Traffic
from minga.inference.tensors import Array

MAX_PENDING_BYTES: Final = 16 * 1024 * 1024
MAX_PENDING_REQUESTS: Final = 50_000
MAX_CELLS: Final = 100_000
"""How many values of one version are looked at between two flushes."""

MAX_PREDICTIONS: Final = 20_000
"""How many answers with an id are kept between two flushes."""

IDLE_S: Final = 10.0
"""How often the sink is asked what it knows while there are no requests."""

MAX_ID_LENGTH: Final = 200
"""Longer ids are a caller's attempt on the store."""

_LOG: Final = logging.getLogger(__name__)
_JOIN_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Seen:
    """One request that was answered."""

    model: OnnxModel
    inputs: Mapping[str, Array]
    outputs: Mapping[str, Array]
    id: str | None
    size: int


@dataclass(slots=True)
class _Thinning:
    """What is not even queued of a version that gets more requests than are looked at.

    Attributes:
        every: of so many requests one is queued; the observer's thread sets it.
        turn: requests so far, queued or not; this and the next are the event loop's.
        passed: rows of those that were not.
        told: of these, how many the observer's thread has counted.
    """

    every: int = 1
    turn: int = 0
    passed: int = 0
    told: int = 0

    def passes_over(self, inputs: Mapping[str, Array]) -> bool:
        """Say whether a request is left out, and count it."""
        self.turn += 1
        if not self.turn % self.every:
            return False
        self.passed += len(next(iter(inputs.values())))
        return True

    def newly_passed(self) -> int:
        """Give the rows that were left out since this was asked last."""
        new = self.passed - self.told
        self.told += new
        return new


@dataclass(slots=True)
class Observed:
    """What became of the rows of requests; each field has one thread that writes it.

    Attributes:
        dropped: requests that found the queue full; rows of them are not counted, that takes time.
        rows: rows that were counted into sketches.
        skipped: rows that were not looked at, since there were too many.
        failed: requests that the monitor could not read, which is a mistake of its own.
    """

    dropped: int = 0
    rows: int = 0
    skipped: int = 0
    failed: int = 0


class Observer:
    """Watches what one process answers; a context manager.

    Args:
        sink: gets the sketches, on a thread.
        flush_s: how often.
        max_pending_bytes: of requests that wait to be counted.
        clock: seconds since 1970.

    Attributes:
        observed: what became of the requests so far.
        summaries: what the sink said last.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        flush_s: float = 1.0,
        max_pending_bytes: int = MAX_PENDING_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._sink = sink
        self._flush_s = flush_s
        self._max_pending_bytes = max_pending_bytes
        self._clock = clock
        self._queue: deque[_Seen] = deque()
        # Each counter has one writer: adding to one number from two threads would lose some.
        self._put_bytes = self._taken_bytes = 0
        self._thinnings: dict[OnnxModel, _Thinning] = {}
        self._traffic: dict[tuple[str, str], Traffic] = {}
        self._told_at = 0.0
        self._is_complaining = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="minga-monitor", daemon=True)
        self.observed = Observed()
        self.summaries: Sequence[ModelSummary] = ()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Begin to count, where no `with` can do it."""
        self._thread.start()

    def close(self) -> None:
        """Count what waits, hand it over, and end the thread; does nothing if never started."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_TIMEOUT_S)

    def observe(
        self,
        model: OnnxModel,
        inputs: Mapping[str, Array],
        outputs: Mapping[str, Array],
        request_id: str | None,
    ) -> None:
        """Note a request that was answered; on the event loop, in about a microsecond.

        The arrays must not be changed afterwards.
        """
        if model.reference is None:
            return
        thinning = self._thinnings.get(model)
        if thinning and request_id is None and thinning.passes_over(inputs):
            return
        size = sum(array.nbytes for array in inputs.values())
        pending = self._put_bytes - self._taken_bytes
        if pending + size > self._max_pending_bytes or len(self._queue) >= MAX_PENDING_REQUESTS:
            self.observed.dropped += 1
            return
        self._put_bytes += size
        self._queue.append(_Seen(model, inputs, outputs, request_id, size))

    def flush(self) -> None:
        """Count what waits and hand it over; on the observer's thread, or before it starts."""
        seen = [self._queue.popleft() for _ in range(len(self._queue))]
        self._taken_bytes += sum(one.size for one in seen)
        by_model: dict[OnnxModel, list[_Seen]] = {}
        for one in seen:
            by_model.setdefault(one.model, []).append(one)
        for model, requests in by_model.items():
            try:
                self._count(model, requests)
            except Exception:  # noqa: BLE001 - whatever a request holds, the thread goes on
                self.observed.failed += len(requests)
                self._complain("requests of model %s cannot be counted", model.ref)
        self._forget_quiet(by_model)
        now = self._clock()
        if not self._traffic and now - self._told_at < IDLE_S:
            return
        try:
            self.summaries = self._sink.take(tuple(self._traffic.values()))
        except MonitorError:
            self._complain("the monitor does not take what was counted; it is kept for later")
            return
        self._traffic.clear()
        self._told_at = now
        self._is_complaining = False

    def _run(self) -> None:
        while not self._stop.wait(self._flush_s):
            self._flush_safely()
        self._flush_safely()

    def _flush_safely(self) -> None:
        try:
            self.flush()
        except Exception:  # noqa: BLE001 - the server must go on, and with it its monitor
            self._complain("the monitor failed")

    def _complain(self, message: str, *arguments: object) -> None:
        """Log with the traceback once, not each second, until it works again."""
        if not self._is_complaining:
            _LOG.exception(message, *arguments)
        self._is_complaining = True

    def _count(self, model: OnnxModel, requests: Sequence[_Seen]) -> None:
        reference = model.reference
        assert reference is not None, "observe has looked"
        input_name, output_name = model.inputs[0].name, model.outputs[0].name
        lengths = np.array([len(one.inputs[input_name]) for one in requests])
        cells_of_row = math.prod(requests[0].inputs[input_name].shape[1:])
        queued = int(lengths.sum())
        rows = queued + self._thin(model, queued, cells_of_row)
        step = -(-queued * cells_of_row // MAX_CELLS)
        sketch = Sketch(reference)
        # A caller may have asked for other outputs only.
        for has_output, part in _parted(_thinned(requests, lengths, step), output_name):
            inputs = np.concatenate([one.inputs[input_name][rows] for one, rows in part])
            outputs = None
            if has_output:
                outputs = np.concatenate([one.outputs[output_name][rows] for one, rows in part])
            sketch.add(inputs, outputs)
        self._keep_predictions(model, reference, requests, output_name)
        self._of(model, reference).sketch.merge(sketch)
        self.observed.rows += sketch.rows
        self.observed.skipped += rows - sketch.rows

    def _thin(self, model: OnnxModel, queued: int, cells_of_row: int) -> int:
        """Give the rows that were not queued, and choose how many are to be from now on."""
        thinning = self._thinnings.get(model)
        passed = thinning.newly_passed() if thinning else 0
        every = max(1, -(-(queued + passed) * cells_of_row // MAX_CELLS))
        if thinning:
            thinning.every = every
        elif every > 1:
            self._thinnings[model] = _Thinning(every=every)
        return passed

    def _forget_quiet(self, asked: Container[OnnxModel]) -> None:
        """Queue all requests again of versions that got hardly any, or are not served any more."""
        for model in [model for model in self._thinnings if model not in asked]:
            self.observed.skipped += self._thinnings.pop(model).newly_passed()

    def _of(self, model: OnnxModel, reference: Reference) -> Traffic:
        key = (model.ref.name, model.ref.version)
        found = self._traffic.get(key)
        if found is None or found.reference.digest != reference.digest:
            found = self._traffic[key] = Traffic(
                model=model.ref.name,
                version=model.ref.version,
                began=self._clock() - self._flush_s,
                sketch=Sketch(reference),
            )
        return found

    def _keep_predictions(
        self, model: OnnxModel, reference: Reference, requests: Sequence[_Seen], output: str
    ) -> None:
        if reference.answers is None:
            return
        kept = self._of(model, reference).predictions
        for one in requests:
            left = MAX_PREDICTIONS - len(kept)
            if one.id is None or len(one.id) > MAX_ID_LENGTH or left <= 0:
                continue
            if output not in one.outputs:
                continue
            # A request has as many rows as its caller likes.
            scores, classes = scores_of(reference.answers.kind, one.outputs[output][:left])
            answers = scores if classes is None else classes
            for place, (score, answer) in enumerate(zip(scores, answers, strict=True)):
                if np.isfinite(score):
                    kept.append(
                        Prediction(
                            request=one.id, place=place, score=float(score), answer=float(answer)
                        )
                    )


def _thinned(requests: Sequence[_Seen], lengths: Array, step: int) -> Sequence[tuple[_Seen, slice]]:
    """Take each `step`-th of all rows in a line; gives the requests they are in, and where.

    Args:
        requests: in the order of their rows.
        lengths: rows of each.
        step: 1 or more.
    """
    if step <= 1:
        return [(one, slice(None)) for one in requests]
    firsts = (lengths - np.cumsum(lengths)) % step
    taken = np.flatnonzero(firsts < lengths).tolist()
    return [(requests[place], slice(int(firsts[place]), None, step)) for place in taken]


def _parted(
    part: Iterable[tuple[_Seen, slice]], output: str
) -> Iterable[tuple[bool, list[tuple[_Seen, slice]]]]:
    parts: dict[bool, list[tuple[_Seen, slice]]] = {True: [], False: []}
    for one, rows in part:
        parts[output in one.outputs].append((one, rows))
    return ((has_output, part) for has_output, part in parts.items() if part)
