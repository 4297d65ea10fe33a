"""Takes requests off the request path, at the price of putting three references into a queue.

The event loop appends to a queue of bounded bytes and never waits: what does not fit is dropped
and counted. A thread looks each `flush_s`, joins the rows of each version into one table, counts
them into a sketch and hands that to a sink. It looks at `MAX_CELLS` values of a version each time
at most; of more it takes every second, third, ... row, and counts the others as not looked at. So
the cost is bounded however many requests come, and windows see rows from the whole time.

An error of the monitor is logged once and never reaches a caller. Sketches that the sink does not
take are kept and added to the next ones.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
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
MAX_CELLS: Final = 250_000
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
        rows = sum(len(one.inputs[input_name]) for one in requests)
        cells = sum(one.inputs[input_name].size for one in requests)
        step = -(-cells // MAX_CELLS)
        sketch = Sketch(reference)
        # A caller may have asked for other outputs only.
        for has_output, part in _parted(requests, lambda one: output_name in one.outputs):
            inputs = _joined([one.inputs[input_name] for one in part], step)
            outputs = (
                _joined([one.outputs[output_name] for one in part], step) if has_output else None
            )
            sketch.add(inputs, outputs)
            if has_output:
                self._keep_predictions(model, reference, part, output_name)
        self._of(model, reference).sketch.merge(sketch)
        self.observed.rows += sketch.rows
        self.observed.skipped += rows - sketch.rows

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


def _parted(
    requests: Iterable[_Seen], is_first: Callable[[_Seen], bool]
) -> Iterable[tuple[bool, list[_Seen]]]:
    parts: dict[bool, list[_Seen]] = {True: [], False: []}
    for one in requests:
        parts[is_first(one)].append(one)
    return ((is_it, part) for is_it, part in parts.items() if part)


def _joined(arrays: Sequence[Array], step: int) -> Array:
    """Join arrays of rows, leaving out all but each `step`-th row."""
    joined = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return joined[::step] if step > 1 else joined
