"""Requests for one model that wait at the same time are computed together.

There is no window of time. While a thread is idle a request runs at once, alone; while all are
busy requests gather, and the next idle thread takes what has gathered, up to a number of rows.
So a lone caller waits for nobody, and a crowd is served in batches as large as it is.

- Models take turns: each idle thread goes to the next model that has requests, so a crowd at one
  delays another model by a batch, not by its queue.
- Within a model the oldest request goes first, and others join it in their order as far as they
  fit. A request with more rows than a batch may have runs alone when its turn comes.
- Only requests whose tensors agree in all but their rows are joined, and only of models whose
  rows do not depend on each other (`OnnxModel.is_rowwise`).
- Where callers take longer to be answered and to ask again than it costs to compute in two runs
  what one could (`Pace.overlaps`), a batch has at most half of the rows that are here, and starts
  before the answers of the one before it are handed out: one half is computed while the other is
  answered. Were all in one batch, the thread would idle while they ask again.
- With an objective for the time of a request, batches stay small enough to be done in half of it,
  so that one that just missed a batch is in time with the next. A request that would be late all
  the same is refused at once, and one that has become late is not computed: work that nobody
  can use would make the others late too.
- An error is the error of the request that caused it: a batch that fails is halved until what
  fails stands alone, and the others are answered.

Joining changes the last bits of floating-point results, as onnxruntime's sums depend on the
shape. `Limits.max_batch_rows = 1` switches it off.

Everything here happens on the event loop, except `_compute`, which runs on a thread.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np

from minga.inference.engine import OnnxModel
from minga.inference.errors import BadRequestError, OverloadedError
from minga.inference.pacing import Pace
from minga.inference.statistics import Execution
from minga.inference.tensors import Array

_Outputs = dict[str, Array]
_Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A request's outputs, and how long it waited for a thread."""

    outputs: _Outputs
    queue_s: float


@dataclass(slots=True, kw_only=True, eq=False)
class _Waiting:
    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    rows: int
    cost_s: float
    result: asyncio.Future[Computed]
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Requests that run together now."""

    model: OnnxModel
    requests: list[_Waiting]
    rows: int


class Batcher:
    """Runs models on threads, joining what waits.

    Args:
        threads: where models run; it must run `num_threads` at once.
        num_threads: how many batches run at once.
        max_rows: the most rows of a batch of several requests.
        objective_s: how long a request may take, waiting included; None means any time.
    """

    def __init__(
        self,
        threads: Executor,
        *,
        num_threads: int,
        max_rows: int,
        objective_s: float | None = None,
    ) -> None:
        self._threads = threads
        self._num_threads = num_threads
        self._num_idle = num_threads
        self._max_rows = max_rows
        self._objective_s = objective_s
        self._paces: WeakKeyDictionary[OnnxModel, Pace] = WeakKeyDictionary()
        self._waiting_s = 0.0  # what all that waits will take, by the paces
        # By when each running batch should have ended.
        self._ends: dict[int, float] = {}
        # Queues in the order of their turns; none is empty.
        self._queues: OrderedDict[tuple[OnnxModel, _Shapes], deque[_Waiting]] = OrderedDict()

    async def run(
        self, model: OnnxModel, inputs: Mapping[str, Array], outputs: tuple[str, ...]
    ) -> Computed:
        """Compute outputs from inputs, perhaps together with other requests.

        Args:
            model: the model.
            inputs: one array per input of the model.
            outputs: the outputs to compute; none means all.

        Raises:
            BadRequestError: the inputs do not fit the model, or it cannot compute from them.
            OverloadedError: it would not be done in time.
        """
        names = model.check(inputs, outputs)
        loop = asyncio.get_running_loop()
        rows = model.rows(inputs)
        pace = self._pace(model, inputs, rows)
        cost_s = pace.estimate_s(rows)
        if self._objective_s is not None and not self._num_idle:
            self._require_time(cost_s, self._objective_s)
        waiting = _Waiting(
            inputs=inputs, outputs=names, rows=rows, cost_s=cost_s, result=loop.create_future()
        )
        self._waiting_s += cost_s
        pace.waiting_rows += rows
        shapes = tuple(inputs[spec.name].shape[1:] for spec in model.inputs)
        self._queues.setdefault((model, shapes), deque()).append(waiting)
        self._start_idle()
        return await waiting.result

    def _pace(self, model: OnnxModel, inputs: Mapping[str, Array], rows: int) -> Pace:
        pace = self._paces.get(model)
        if pace is None:
            size = sum(array.nbytes for array in inputs.values())
            pace = self._paces[model] = Pace(
                row_s=model.estimate_s(size) / max(rows, 1),
                max_rows=self._max_rows,
                target_s=None if self._objective_s is None else self._objective_s / 2,
            )
        return pace

    def _require_time(self, cost_s: float, objective_s: float) -> None:
        now = time.perf_counter()
        running_s = sum(max(end - now, 0.0) for end in self._ends.values())
        ahead_s = (running_s + self._waiting_s) / self._num_threads
        if ahead_s + cost_s > objective_s:
            raise OverloadedError(
                f"what waits already takes about {ahead_s:.2g} s, and a request may take "
                f"{objective_s:g} s here; try again later",
                retry_after_s=ahead_s,
            )

    def _start_idle(self) -> None:
        while self._num_idle and (batch := self._next_batch()):
            self._num_idle -= 1
            cost_s = sum(request.cost_s for request in batch.requests)
            self._ends[id(batch)] = time.perf_counter() + cost_s
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._threads, _compute, batch)
            running.add_done_callback(partial(self._finish, batch))

    def _next_batch(self) -> _Batch | None:
        while self._queues:
            key, queue = self._queues.popitem(last=False)
            model = key[0]
            pace = self._paces[model]
            limit = pace.next_rows() if model.is_rowwise else -1
            requests: list[_Waiting] = []
            rows = 0
            while queue and (not requests or rows + queue[0].rows <= limit):
                request = queue.popleft()
                self._waiting_s -= request.cost_s
                pace.waiting_rows -= request.rows
                if self._is_late(request):
                    self._refuse(request)
                elif not request.result.done():  # else its caller has left
                    requests.append(request)
                    rows += request.rows
            if queue:
                self._queues[key] = queue
            if requests:
                return _Batch(model=model, requests=requests, rows=rows)
        self._waiting_s = 0.0  # what rounding left
        return None

    def _is_late(self, request: _Waiting) -> bool:
        if self._objective_s is None:
            return False
        return time.perf_counter() - request.since > self._objective_s

    def _refuse(self, request: _Waiting) -> None:
        if not request.result.done():
            error = OverloadedError(f"it waited for over {self._objective_s:g} s; try again later")
            request.result.set_exception(error)

    def _finish(self, batch: _Batch, done: asyncio.Future["_Outcome"]) -> None:
        """Hand out what a thread has computed, and give the thread its next batch.

        Usually that is made when those who get their answers now have had their turn: who asks
        again at once then joins it, instead of waiting for it to end.
        """
        del self._ends[id(batch)]
        pace = self._paces[batch.model]
        if done.exception() is None:
            for execution, num_requests in done.result().executions:
                pace.note(execution.rows, execution.total_s)
                batch.model.statistics.executed(execution, num_requests=num_requests)
        overlaps = bool(self._queues) and pace.overlaps
        if overlaps:
            self._take_back()
        answered = partial(self._answered, batch, time.perf_counter(), takes_back=not overlaps)
        try:
            self._hand_out(batch, done)
        finally:
            asyncio.get_running_loop().call_soon(answered)

    def _hand_out(self, batch: _Batch, done: asyncio.Future["_Outcome"]) -> None:
        error = done.exception()
        if error is None:
            outcome = done.result()
            for request, answer in zip(batch.requests, outcome.answers, strict=True):
                _settle(request, answer, queue_s=outcome.began - request.since)
        else:
            for request in batch.requests:
                _settle(request, error, queue_s=0)

    def _answered(self, batch: _Batch, since: float, *, takes_back: bool) -> None:
        """Go on after all who got answers now have had their turn."""
        self._paces[batch.model].note_answers(batch.rows, time.perf_counter() - since)
        if takes_back:
            self._take_back()

    def _take_back(self) -> None:
        self._num_idle += 1
        self._start_idle()


@dataclass(slots=True, kw_only=True)
class _Outcome:
    """What became of a batch: an answer per request, and the runs that it took."""

    began: float = field(default_factory=time.perf_counter)
    answers: list[_Outputs | BadRequestError] = field(default_factory=list)
    executions: list[tuple[Execution, int]] = field(default_factory=list)


def _settle(request: _Waiting, answer: _Outputs | BaseException, *, queue_s: float) -> None:
    if request.result.done():  # its caller has left
        return
    if isinstance(answer, BaseException):
        request.result.set_exception(answer)
    else:
        request.result.set_result(Computed(outputs=answer, queue_s=queue_s))


def _compute(batch: _Batch) -> _Outcome:
    """Run a batch, and again in halves where it fails; on a thread."""
    outcome = _Outcome()
    _compute_part(batch.model, batch.requests, outcome)
    return outcome


def _compute_part(model: OnnxModel, requests: list[_Waiting], outcome: _Outcome) -> None:
    try:
        answers, execution = _compute_together(model, requests)
    except BadRequestError as error:
        if len(requests) == 1:
            outcome.answers.append(error)
            return
        half = len(requests) // 2
        _compute_part(model, requests[:half], outcome)
        _compute_part(model, requests[half:], outcome)
    else:
        outcome.answers.extend(answers)
        outcome.executions.append((execution, len(requests)))


def _compute_together(
    model: OnnxModel, requests: list[_Waiting]
) -> tuple[list[_Outputs], Execution]:
    rows = sum(request.rows for request in requests)
    start = time.perf_counter()
    if len(requests) == 1:
        outputs = model.compute(requests[0].inputs, requests[0].outputs)
        return [outputs], Execution(rows=rows, infer_s=time.perf_counter() - start)
    inputs = {
        spec.name: np.concatenate([request.inputs[spec.name] for request in requests])
        for spec in model.inputs
    }
    names = tuple(dict.fromkeys(name for request in requests for name in request.outputs))
    joined = time.perf_counter()
    outputs = model.compute(inputs, names)
    computed = time.perf_counter()
    if any(array.shape[:1] != (rows,) for array in outputs.values()):
        raise BadRequestError(f"model {model.ref} gives no row of output per row of input")
    answers = _part(outputs, requests)
    return answers, Execution(
        rows=rows,
        input_s=joined - start,
        infer_s=computed - joined,
        output_s=time.perf_counter() - computed,
    )


def _part(outputs: Mapping[str, Array], requests: list[_Waiting]) -> list[_Outputs]:
    answers: list[_Outputs] = []
    first = 0
    for request in requests:
        rows = slice(first, first + request.rows)
        answers.append({name: outputs[name][rows] for name in request.outputs})
        first = rows.stop
    return answers
