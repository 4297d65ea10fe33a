"""What a server of models does, whatever wire its callers come over.

HTTP (`app`) and gRPC (`grpc_service`) hand in a `Call`, which knows its wire, and get back what
the call made of the response. Counting, batching, threads and limits are here, once.

A small request to a small model is computed on the event loop, since a hop to a thread takes
longer. Others go to the batcher; long bodies are read and written on threads of their own, so
that a thread that computes never waits for JSON.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version as installed_version
from typing import Any, Final, Protocol, TypeVar

import numpy as np
from prometheus_client import CollectorRegistry

from minga.inference.access import Access
from minga.inference.batching import Batcher, Computed
from minga.inference.bodies import Budget, DisconnectedError, Share
from minga.inference.comparing import Mode
from minga.inference.engine import OnnxModel
from minga.inference.errors import (
    AsleepError,
    BadRequestError,
    ForbiddenError,
    InferenceError,
    ModelError,
    UnavailableError,
)
from minga.inference.explaining import attributions, baseline_of, occluded, rows_of
from minga.inference.limits import Limits
from minga.inference.metrics import InferenceMetrics
from minga.inference.monitor.metrics import MonitorSeries
from minga.inference.monitor.observer import Observer
from minga.inference.protocol import BINARY_EXTENSION, InferRequest, InferResponse
from minga.inference.repository import ModelRepository
from minga.inference.side_by_side import SideBySide
from minga.inference.statistics import Execution
from minga.inference.tensors import Array

SERVER_NAME: Final = "minga"
MAX_OUTCOME: Final = 1e100  # squares of such still add up
EXTENSIONS: Final = (BINARY_EXTENSION, "statistics", "model_repository")
"""What is served beyond the protocol's core, by Triton's names."""

_CALLER_LEFT: Final = 499  # nginx' number for it; nobody receives it, only the metrics
# A hop to a thread and back costs about 0.1 ms; computing longer than this on the loop would
# be felt by the other connections.
_INLINE_S: Final = 0.001
_INLINE_BYTES: Final = 64 * 1024

_LOG: Final = logging.getLogger(__name__)

T = TypeVar("T")
AnswerT_co = TypeVar("AnswerT_co", covariant=True)


class Call(Protocol[AnswerT_co]):
    """One inference request on its wire."""

    async def receive(self, limits: Limits) -> int:
        """Wait for the whole request; give its size in bytes, without any content coding.

        Raises:
            RequestError: it is over a limit.
            OverloadedError: its share of the memory is too large.
        """
        ...

    def decode(self, model: OnnxModel) -> InferRequest:
        """Read what was received; on any thread.

        Raises:
            RequestError: it is no request of the protocol.
        """
        ...

    def encode(self, response: InferResponse, request: InferRequest) -> AnswerT_co:
        """Write the response; on any thread.

        Raises:
            BadRequestError: the wire cannot carry it in the form that was asked for.
        """
        ...

    def header(self, name: str) -> str | None:
        """Give what the caller said of the request under this name; None if nothing."""
        ...


class ModelControl(Protocol):
    """Loads and unloads models for all processes that serve them."""

    async def load(self, name: str) -> None:
        """Let a declared model answer.

        Raises:
            UnknownModelError: no such model is declared.
            ModelError: it cannot be served.
        """
        ...

    async def unload(self, name: str) -> None:
        """Let a model answer no more, and free its memory.

        Raises:
            UnknownModelError: no such model is declared.
        """
        ...


class LocalControl:
    """Loads and unloads in one repository, which is all there is."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    async def load(self, name: str) -> None:
        """See `ModelControl.load`."""
        await asyncio.to_thread(self._repository.load, name)

    async def unload(self, name: str) -> None:
        """See `ModelControl.unload`."""
        await asyncio.to_thread(self._repository.unload, name)


@dataclass(slots=True)
class _Times:
    """Where a request's time goes, in seconds, and who answered if not the model's default."""

    queue_s: float = 0.0
    input_s: float = 0.0
    output_s: float = 0.0
    model: OnnxModel | None = None


class InferenceService:
    """Answers for the models of a repository, on one event loop.

    Args:
        repository: the models; it may change at any time.
        limits: what callers are granted.
        registry: where the Prometheus series live.
        control: what loads and unloads models where `limits.model_control` lets callers; by
            default in `repository` alone.
        access: who is let in; what brings requests here asks it. By default everyone is.
        observer: watches what is answered, if anything does; its owner starts and closes it.
    """

    def __init__(
        self,
        repository: ModelRepository,
        *,
        limits: Limits | None = None,
        registry: CollectorRegistry | None = None,
        control: ModelControl | None = None,
        access: Access | None = None,
        observer: Observer | None = None,
    ) -> None:
        self.repository = repository
        self.access = access or Access()
        self.limits = limits or Limits()
        registry = registry or CollectorRegistry()
        self.side_by_side = SideBySide(
            compute=self._compute, find=self.model, run=self._run, beside=self.beside
        )
        self.metrics = InferenceMetrics(repository, registry, self.side_by_side)
        self._observer = observer
        if observer is not None:
            registry.register(MonitorSeries(observer, repository))
        self._control = control or LocalControl(repository)
        num_threads = self.limits.num_threads
        self._threads = ThreadPoolExecutor(num_threads, "minga-inference")
        self._readers = ThreadPoolExecutor(num_threads, "minga-bodies")
        self._batcher = Batcher(
            self._threads,
            num_threads=num_threads,
            max_rows=self.limits.max_batch_rows,
            objective_s=self.limits.objective_s,
        )
        self._budget = Budget(self.limits.max_pending_bytes)
        self._waking: dict[tuple[str, str | None], asyncio.Future[OnnxModel]] = {}

    def close(self) -> None:
        """Let the threads end with what they are doing."""
        self._threads.shutdown(wait=False)
        self._readers.shutdown(wait=False)

    async def infer(self, name: str, version: str | None, call: Call[T]) -> T:
        """Answer one request, and count it.

        Args:
            name: the model.
            version: which version answers; None means the model's default.
            call: the request.

        Raises:
            InferenceError: it cannot be answered, as the error says.
            DisconnectedError: its caller went away.
        """
        if (arms := self.side_by_side.arms.get(name)) and version is None:
            return await self._answer(name, None, call, partial(self.side_by_side.answer, arms))
        return await self._answer(name, version, call, self._compute)

    async def explain(self, name: str, version: str | None, call: Call[T]) -> T:
        """Answer with what each feature adds to each output, and count it as a request.

        Args:
            name: the model.
            version: which version is explained; None means the model's default.
            call: the request; see `explaining` for its parameters.

        Raises:
            InferenceError: it cannot be answered, as the error says.
            DisconnectedError: its caller went away.
        """
        return await self._answer(name, version, call, self._explain)

    async def _answer(
        self,
        name: str,
        version: str | None,
        call: Call[T],
        compute: Callable[[OnnxModel, Call[T], int, _Times], Awaitable[T]],
    ) -> T:
        start = time.perf_counter()
        self.metrics.begin()
        model: OnnxModel | None = None
        times = _Times()
        status = 200
        try:
            try:
                model = self.repository.get(name, version)
            except AsleepError:
                model = await self.model(name, version)
            size = await call.receive(self.limits)
            answer = await compute(model, call, size, times)
        except InferenceError as error:
            status = error.status
            raise
        except (DisconnectedError, asyncio.CancelledError):
            status = _CALLER_LEFT
            raise
        except BaseException:
            status = 500
            raise
        finally:
            self._count(times.model or model, status, time.perf_counter() - start, times)
        return answer

    async def model(self, name: str, version: str | None) -> OnnxModel:
        """Give a version of a model, waking it if it sleeps; several callers wake it once.

        Raises:
            UnknownModelError: no such model or version is served.
            UnavailableError: it cannot be served now.
        """
        with suppress(AsleepError):
            return self.repository.get(name, version)
        waking = self._waking.get((name, version))
        if waking is None:
            waking = asyncio.ensure_future(asyncio.to_thread(self.repository.wake, name, version))
            self._waking[name, version] = waking
            waking.add_done_callback(partial(self._awoken, (name, version)))
        try:
            return await asyncio.shield(waking)
        except ModelError as error:
            raise UnavailableError(str(error)) from error

    def _awoken(self, which: tuple[str, str | None], waking: "asyncio.Future[OnnxModel]") -> None:
        del self._waking[which]
        if not waking.cancelled() and (error := waking.exception()):
            _LOG.warning("cannot wake model %s: %s", which[0], error)

    def share(self) -> Share:
        """Give a request's part of the memory that requests and answers together may take.

        A context manager: the part is given back when the answer has gone.
        """
        return self._budget.share()

    async def beside(self, size: int, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function whose cost grows with a size: here if small, else on a thread."""
        if size <= _INLINE_BYTES:
            return function(*arguments)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, function, *arguments)

    async def _compute(self, model: OnnxModel, call: Call[T], size: int, times: _Times) -> T:
        start = time.perf_counter()
        if size <= _INLINE_BYTES and model.estimate_s(size) < _INLINE_S:
            request = call.decode(model)
            names = model.check(request.inputs, request.output_names)
            decoded = time.perf_counter()
            outputs = model.compute(request.inputs, names)
            computed = time.perf_counter()
            execution = Execution(rows=model.rows(request.inputs), infer_s=computed - decoded)
            model.statistics.executed(execution, num_requests=1)
            answer = call.encode(model.response(request, outputs), request)
        else:
            request = await self.beside(size, call.decode, model)
            decoded = time.perf_counter()
            result = await self._batcher.run(model, request.inputs, request.output_names)
            computed = time.perf_counter()
            outputs, times.queue_s = result.outputs, result.queue_s
            size = sum(array.nbytes for array in outputs.values())
            answer = await self.beside(size, call.encode, model.response(request, outputs), request)
        if self._observer is not None:
            self._observer.observe(model, request.inputs, outputs, request.id)
        times.input_s = decoded - start
        times.output_s = time.perf_counter() - computed
        return answer

    async def _run(
        self, model: OnnxModel, inputs: Mapping[str, Array], outputs: tuple[str, ...]
    ) -> Computed:
        return await self._batcher.run(model, inputs, outputs)

    async def _explain(self, model: OnnxModel, call: Call[T], size: int, times: _Times) -> T:
        """Compute piece by piece, so that other requests have their turns in between."""
        start = time.perf_counter()
        request = await self.beside(size, call.decode, model)
        names = model.check(request.inputs, request.output_names)
        rows = rows_of(model, request.inputs)
        baseline = baseline_of(model, request.parameters, rows)
        times.input_s = time.perf_counter() - start
        pieces: list[dict[str, Array]] = []
        for piece in occluded(rows, baseline, max_rows=self.limits.max_batch_rows):
            result = await self._batcher.run(model, {model.inputs[0].name: piece}, names)
            times.queue_s += result.queue_s
            pieces.append(result.outputs)
        outputs = {
            name: attributions(
                np.concatenate([piece[name] for piece in pieces]), num_rows=len(rows)
            )
            for name in names
            if pieces and pieces[0][name].dtype.kind in "fiub"
        }
        return await self.beside(
            sum(array.nbytes for array in outputs.values()),
            call.encode,
            model.response(request, outputs),
            request,
        )

    def _count(self, model: OnnxModel | None, status: int, total_s: float, times: _Times) -> None:
        self.metrics.end(
            model=model.ref.name if model else "",
            version=model.ref.version if model else "",
            status=status,
            duration_s=total_s,
        )
        if model is None:
            return
        if status == 200:
            model.statistics.answered(
                total_s=total_s,
                queue_s=times.queue_s,
                input_s=times.input_s,
                output_s=times.output_s,
            )
        else:
            model.statistics.failed(total_s)

    def require_ready(self) -> None:
        """Check that there are models.

        Raises:
            UnavailableError: there are none yet.
        """
        if not self.repository.is_ready:
            raise UnavailableError("no model is loaded yet; try again shortly")

    def statistics(self, name: str | None, version: str | None) -> list[dict[str, Any]]:
        """Give what versions have done since they were declared, in Triton's form.

        Args:
            name: of which model; None means all.
            version: of which version; None means all.

        Raises:
            UnknownModelError: no such model or version is served.
            UnavailableError: nothing is served yet.
        """
        refs = self.repository.refs if name is None else self.repository.find(name, version)
        return [
            {
                "name": ref.name,
                "version": ref.version,
                **self.repository.statistics(ref).snapshot(),
            }
            for ref in refs
        ]

    def index(self, *, only_ready: bool) -> list[dict[str, str]]:
        """List declared versions with their state, in Triton's form."""
        return [
            {
                "name": entry.name,
                "version": entry.version,
                "state": "READY" if entry.is_loaded else "UNAVAILABLE",
                "reason": "" if entry.is_loaded else "unloaded",
            }
            for entry in self.repository.index()
            if entry.is_loaded or not only_ready
        ]

    def report_outcomes(self, name: str, outcomes: Sequence[tuple[str, float]]) -> int:
        """Count what became of answers for the versions that gave them, while a split runs.

        Args:
            name: the model.
            outcomes: the key that a caller sent with its requests, and how good the answers were
                for it: one number per key.

        Returns:
            How many were counted: none where no split runs.

        Raises:
            BadRequestError: an outcome is no finite number, or none that adds up; none is counted.
            UnknownModelError: no such model is served.
            UnavailableError: nothing is served yet.
        """
        if not all(abs(value) <= MAX_OUTCOME for _, value in outcomes):
            raise BadRequestError(
                f"the value of an outcome must be a number from -{MAX_OUTCOME:g} to {MAX_OUTCOME:g}"
            )
        self.repository.find(name)
        arms = self.side_by_side.arms.get(name)
        if arms is None or arms.comparison.mode is not Mode.SPLIT:
            return 0
        counted = 0
        for key, value in outcomes:
            arms.report_outcome(key, value)
            counted += 1
        return counted

    async def load(self, name: str) -> None:
        """Load a declared model.

        Raises:
            ForbiddenError: callers may not.
            UnknownModelError: no such model is declared.
            UnavailableError: it cannot be served.
        """
        self._require_control()
        try:
            await self._control.load(name)
        except ModelError as error:
            raise UnavailableError(str(error)) from error

    async def unload(self, name: str) -> None:
        """Unload a model; it stays declared.

        Raises:
            ForbiddenError: callers may not.
            UnknownModelError: no such model is declared.
        """
        self._require_control()
        await self._control.unload(name)

    def _require_control(self) -> None:
        if not self.limits.model_control:
            raise ForbiddenError(
                "this server does not let its callers load and unload models; "
                "model_control = true in [serving] does"
            )


@cache
def server_version() -> str:
    """Give the version of Minga that serves."""
    return installed_version("minga")
