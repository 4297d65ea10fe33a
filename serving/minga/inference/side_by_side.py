"""Answers a model's requests while two of its versions are compared; see `comparing`."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, Generic, Protocol, TypeVar

from minga.inference.batching import Computed
from minga.inference.comparing import Arms, Comparison, Mode, key_of
from minga.inference.engine import OnnxModel
from minga.inference.errors import InferenceError, OverloadedError
from minga.inference.protocol import InferRequest, InferResponse
from minga.inference.tally import Tally, compare
from minga.inference.tensors import Array

_LOG: Final = logging.getLogger(__name__)
_MAX_SHADOWS: Final = 8  # at once; what comes beyond is not shadowed

T = TypeVar("T")
AnswerT_co = TypeVar("AnswerT_co", covariant=True)


class Decoder(Protocol[AnswerT_co]):
    """What is needed of a call (`service.Call`) that was received."""

    def decode(self, model: OnnxModel) -> InferRequest:
        """See `Call.decode`."""
        ...

    def encode(self, response: InferResponse, request: InferRequest) -> AnswerT_co:
        """See `Call.encode`."""
        ...

    def header(self, name: str) -> str | None:
        """See `Call.header`."""
        ...


class Decoded(Generic[T]):
    """A call that was read already, so that either version may answer it, or both."""

    def __init__(self, call: Decoder[T], request: InferRequest) -> None:
        self.request = request
        self.outputs: Mapping[str, Array] = {}
        self._call = call

    async def receive(self, _limits: Any) -> int:
        """Nothing is left to wait for."""
        return 0

    def header(self, name: str) -> str | None:
        """See `Call.header`."""
        return self._call.header(name)

    def decode(self, _model: OnnxModel) -> InferRequest:
        """Give what was read."""
        return self.request

    def encode(self, response: InferResponse, request: InferRequest) -> T:
        """Write the response, and keep its outputs."""
        self.outputs = response.outputs
        return self._call.encode(response, request)


Compute = Callable[[OnnxModel, Any, int, Any], Awaitable[Any]]
Run = Callable[[OnnxModel, Mapping[str, Array], tuple[str, ...]], Awaitable[Computed]]


class SideBySide:
    """The comparisons under way in one server.

    Args:
        compute: answers a call with a version, as `InferenceService` does.
        find: gives a version of a model, waking it if it sleeps.
        run: computes outputs beside the event loop.
        beside: calls what takes as long as a size says, there if it is long.

    Attributes:
        arms: the comparison of each model of which versions are compared.
        shadows: the requests that are computed in the shadow now.
    """

    def __init__(
        self,
        *,
        compute: Compute,
        find: Callable[[str, str | None], Awaitable[OnnxModel]],
        run: Run,
        beside: Callable[..., Awaitable[Any]],
    ) -> None:
        self._compute = compute
        self._find = find
        self._run = run
        self._beside = beside
        self.arms: dict[str, Arms] = {}
        self.shadows: set[asyncio.Task[None]] = set()

    def declare(self, comparisons: Iterable[Comparison]) -> None:
        """Compare exactly these; one that goes on keeps its counts."""
        known = {arms.comparison: arms for arms in self.arms.values()}
        self.arms = {each.model: known.get(each) or Arms(each) for each in comparisons}

    @property
    def declared(self) -> tuple[Comparison, ...]:
        """The comparisons under way."""
        return tuple(arms.comparison for arms in self.arms.values())

    def counts(self) -> dict[str, dict[str, Tally]]:
        """Give what was counted, by comparison and role."""
        return {arms.comparison.id: arms.counts() for arms in self.arms.values()}

    async def answer(
        self, arms: Arms, model: OnnxModel, call: Decoder[T], size: int, times: Any
    ) -> T:
        """Answer a call with one of the two versions.

        Args:
            arms: the comparison.
            model: the baseline.
            call: what was received.
            size: its bytes.
            times: where it is told how long what took, and who has answered.

        Raises:
            InferenceError: neither version can answer it.
        """
        request = await self._beside(size, call.decode, model)
        decoded = Decoded(call, request)
        comparison = arms.comparison
        key = key_of(request.parameters, call.header(comparison.key), comparison.key)
        is_challengers, counts = arms.choose(key)
        if comparison.mode is Mode.SHADOW:
            answer = await self._counted(arms.baseline, model, decoded, size, times)
            if is_challengers:
                self._shadow(arms, decoded)
            return answer
        if is_challengers:
            try:
                challenger = await self._find(comparison.model, comparison.challenger)
                answer = await self._counted(arms.challenger, challenger, decoded, size, times)
            except OverloadedError:
                raise  # the baseline has no more time for it
            except Exception as error:  # noqa: BLE001 - whatever it is, the baseline may do better
                answer = await self._compute(model, decoded, size, times)
                arms.challenger.failed()
                _LOG.warning("the baseline answered for %s: %s", comparison.id, error)
            else:
                times.model = challenger
            return answer
        tally = arms.baseline if counts else Tally()
        return await self._counted(tally, model, decoded, size, times)

    async def _counted(
        self, tally: Tally, model: OnnxModel, call: Decoded[T], size: int, times: Any
    ) -> T:
        start = time.perf_counter()
        try:
            answer: T = await self._compute(model, call, size, times)
        except (InferenceError, asyncio.CancelledError):
            raise  # a mistake of the caller's, or an answer that nobody waits for
        except Exception:
            tally.failed()
            raise
        tally.answered(time.perf_counter() - start, call.outputs.values())
        return answer

    def _shadow(self, arms: Arms, call: Decoded[Any]) -> None:
        if len(self.shadows) >= _MAX_SHADOWS:
            return
        task = asyncio.get_running_loop().create_task(
            self._repeat(arms, call.request, dict(call.outputs))
        )
        self.shadows.add(task)
        task.add_done_callback(self.shadows.discard)

    async def _repeat(
        self, arms: Arms, request: InferRequest, outputs: Mapping[str, Array]
    ) -> None:
        """Let the challenger compute what the baseline has answered."""
        comparison = arms.comparison
        start = time.perf_counter()
        try:
            model = await self._find(comparison.model, comparison.challenger)
            computed = await self._run(model, request.inputs, request.output_names)
        except OverloadedError:
            return  # it had no chance
        except Exception as error:  # noqa: BLE001 - nobody waits for a shadow's answer
            arms.challenger.failed()
            _LOG.warning("%s could not answer in the shadow: %s", comparison.id, error)
            return
        arms.challenger.answered(time.perf_counter() - start, computed.outputs.values())
        compare(outputs, computed.outputs, arms.challenger)
