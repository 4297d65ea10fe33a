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

import numpy as np

from minga.inference.engine import OnnxModel
from minga.inference.errors import BadRequestError
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
    result: asyncio.Future[Computed]
    since: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """Requests that run together now."""

    model: OnnxModel
    requests: list[_Waiting]


class Batcher:
    """Runs models on threads, joining what waits.

    Args:
        threads: where models run; it must run `num_threads` at once.
        num_threads: how many batches run at once.
        max_rows: the most rows of a batch of several requests.
    """

    def __init__(self, threads: Executor, *, num_threads: int, max_rows: int) -> None:
        self._threads = threads
        self._num_idle = num_threads
        self._max_rows = max_rows
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
        """
        names = model.check(inputs, outputs)
        loop = asyncio.get_running_loop()
        waiting = _Waiting(
            inputs=inputs, outputs=names, rows=model.rows(inputs), result=loop.create_future()
        )
        shapes = tuple(inputs[spec.name].shape[1:] for spec in model.inputs)
        self._queues.setdefault((model, shapes), deque()).append(waiting)
        self._start_idle()
        return await waiting.result

    def _start_idle(self) -> None:
        while self._num_idle and (batch := self._next_batch()):
            self._num_idle -= 1
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._threads, _compute, batch)
            running.add_done_callback(partial(self._finish, batch))

    def _next_batch(self) -> _Batch | None:
        while self._queues:
            key, queue = self._queues.popitem(last=False)
            model = key[0]
            limit = self._max_rows if model.is_rowwise else -1
            requests: list[_Waiting] = []
            rows = 0
            while queue and (not requests or rows + queue[0].rows <= limit):
                request = queue.popleft()
                if not request.result.done():  # its caller has left
                    requests.append(request)
                    rows += request.rows
            if queue:
                self._queues[key] = queue
            if requests:
                return _Batch(model=model, requests=requests)
        return None

    def _finish(self, batch: _Batch, done: asyncio.Future["_Outcome"]) -> None:
        """Hand out what a thread has computed, and give the thread its next batch.

        That is made after those who get their answers now have had their turn: who asks again at
        once then joins it, instead of waiting for it to end.
        """
        try:
            self._hand_out(batch, done)
        finally:
            asyncio.get_running_loop().call_soon(self._take_back)

    def _hand_out(self, batch: _Batch, done: asyncio.Future["_Outcome"]) -> None:
        error = done.exception()
        if error is None:
            outcome = done.result()
            for execution, num_requests in outcome.executions:
                batch.model.statistics.executed(execution, num_requests=num_requests)
            for request, answer in zip(batch.requests, outcome.answers, strict=True):
                _settle(request, answer, queue_s=outcome.began - request.since)
        else:
            for request in batch.requests:
                _settle(request, error, queue_s=0)

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
