"""The agent: one control stream to the coordinator, kept open for as long as the device is up.

It connects out only. A broken link is dialled again, later each time and somewhat at random; the
local model goes on answering meanwhile.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import grpc

from minga.federation import transfer, transport, wire
from minga.federation.condition import Condition
from minga.federation.device.capacity import Capacity, Compress
from minga.federation.device.keepsakes import Keepsakes
from minga.federation.device.link import Link
from minga.federation.device.machine import measure
from minga.federation.device.metrics import Metrics
from minga.federation.device.participant import Participant
from minga.federation.device.queries import NO_QUERIES, Queries
from minga.federation.device.redial import Redial
from minga.federation.device.slots import ModelSlots
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.errors import (
    AccessError,
    FederationError,
    IdentityError,
    PeerError,
    UnreachableError,
)
from minga.federation.limits import (
    HEARTBEAT_INTERVAL_S,
    MAX_PENDING_BYTES,
    MIN_HEARTBEAT_INTERVAL_S,
    SILENT_HEARTBEATS,
)
from minga.federation.secagg.sizing import MIN_COHORT
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from minga.federation.wire import printable
from minga.inference.engine import ModelRef
from minga.inference.errors import InferenceError
from minga.inference.repository import ModelRepository

_log = logging.getLogger(__name__)

Outbox = asyncio.Queue[pb.SessionRequest | None]
"""What is to be sent on one stream; None ends it."""

SessionCall = grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]


class Agent:
    """One device at work.

    Args:
        link: the way to the coordinator, and who this device is.
        trainer: what trains here; None for a device that only runs models.
        slots: where models are kept.
        models: what the local inference server answers from.
        metrics: what Prometheus reads.
        keepsakes: what this device keeps for itself from round to round; None: nothing.
        allow_plain: whether the coordinator may see this device's updates.
        min_noise: least noise multiplier of sums that its updates go into; 0: none.
        min_summed: fewest updates in such a sum, its own included, whoever is lost.
        queries: what queries may find out here.
        look: says what this machine is doing.
        compress: when models and plain updates travel as Zstandard frames.
    """

    def __init__(
        self,
        *,
        link: Link,
        trainer: TrainerProcess | None,
        slots: ModelSlots,
        models: ModelRepository,
        metrics: Metrics,
        keepsakes: Keepsakes | None = None,
        allow_plain: bool = False,
        min_noise: float = 0.0,
        min_summed: int = MIN_COHORT,
        queries: Queries = NO_QUERIES,
        look: Callable[[], Condition] = measure,
        compress: Compress = "auto",
    ) -> None:
        self._link = link
        self._redial = Redial(link)
        self._look = look
        self._queries = queries
        self._keepsakes = keepsakes
        self._capacity = Capacity(compress, metrics)
        self._allow_plain = allow_plain
        self._min_noise = min_noise
        self._min_summed = min_summed
        self._trainer = trainer
        self._slots = slots
        self._models = models
        self._metrics = metrics
        self._participant: Participant | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._pending_bytes = 0
        self._model_turn = asyncio.Lock()
        self._heartbeat_interval_s = HEARTBEAT_INTERVAL_S
        self._resting_s = HEARTBEAT_INTERVAL_S  # until the next beat, which sets this anew
        self._outbox: Outbox = asyncio.Queue()
        metrics.certificate_end.set_function(link.valid_until)

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            AccessError: the coordinator refuses this device for good.
            IdentityError: this device's or the coordinator's certificate does not hold.
        """
        clock = asyncio.get_running_loop().time
        try:
            await self._restore_models()
            self._spawn(self._link.keep_valid())
            while True:
                opened_at = clock()
                try:
                    await self._connect()
                    _log.info("the coordinator closed the stream")
                except (AccessError, IdentityError):
                    raise
                except FederationError as error:
                    _log.warning("%s", error)
                except Exception:  # noqa: BLE001 - the local model must go on answering
                    _log.exception("the stream to the coordinator failed")
                self._redial.note_stream(clock() - opened_at)
                await self._redial.pause(in_round=self._participant is not None)
        finally:
            await self._close()

    async def _connect(self) -> None:
        """Serve a stream; a coordinator whose issuer is not known may have a newer one."""
        self._link.require_valid()
        await self._link.try_to_renew()
        try:
            await self._stay()
        except AccessError:
            raise
        except IdentityError:
            if not await self._link.follow():
                raise

    async def _close(self) -> None:
        self._drop_participant()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._trainer is not None:
            await self._trainer.close()
        await self._link.close()

    # --- the stream ---

    async def _stay(self) -> None:
        """Serve a stream until it ends.

        When the certificate was renewed, a stream with the new one is opened first, and the
        coordinator then ends the one before: the device is away at no moment, and what it holds of
        a round stays. An answer that is on its way meanwhile is asked for again on the new stream.
        """
        streams: list[asyncio.Task[None]] = []
        try:
            while True:
                renewed = self._link.changed
                streams.append(asyncio.create_task(self._session()))
                if not await _comes_before(renewed, streams[-1]):
                    return await streams[-1]
                streams = [stream for stream in streams if not stream.done()]
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _session(self) -> None:
        """Open one stream and serve it until it ends."""
        outbox = self._outbox = asyncio.Queue()
        self._send(pb.SessionRequest(hello=self._hello()))
        self._heartbeat_interval_s = self._resting_s = HEARTBEAT_INTERVAL_S
        heart: asyncio.Task[None] | None = None
        try:
            async with self._link.channel() as channel:
                with transport.calling(self._link.address):
                    call = pb_grpc.FederationServiceStub(channel).Session(_drain(outbox))
                    messages = self._heard(call)
                    self._take_welcome(await anext(messages, None))
                    self._resting_s = self._heartbeat_interval_s  # as its first beat will
                    heart = asyncio.create_task(self._beat(outbox))
                    async for message in messages:
                        self._take(message)
        finally:
            if heart is not None:
                heart.cancel()
            outbox.put_nowait(None)
            if outbox is self._outbox:
                self._metrics.connected.set(0)

    def _take_welcome(self, message: pb.SessionResponse | None) -> None:
        if message is None or message.WhichOneof("body") != "welcome":
            raise PeerError(f"the coordinator at {self._link.address} did not greet this device")
        self._take_times(message.welcome)
        self._metrics.connected.set(1)
        _log.info("connected to %s as %s", self._link.address, self._link.identity.name)

    def _take_times(self, welcome: pb.Welcome) -> None:
        self._redial.note_window(welcome.reconnect_window_ms)
        if welcome.heartbeat_interval_ms:
            interval_s = welcome.heartbeat_interval_ms / 1000
            self._heartbeat_interval_s = max(interval_s, MIN_HEARTBEAT_INTERVAL_S)

    async def _heard(self, call: "SessionCall") -> AsyncIterator[pb.SessionResponse]:
        """Give what the coordinator says, until it says nothing for several heartbeats.

        Raises:
            UnreachableError: it fell silent.
            PeerError: it sent what is no message.
        """
        while True:
            message: Any
            patience_s = SILENT_HEARTBEATS * max(self._heartbeat_interval_s, self._resting_s)
            try:
                async with asyncio.timeout(patience_s):
                    message = await call.read()
            except TimeoutError:
                raise UnreachableError(
                    f"the coordinator at {self._link.address} said nothing for {patience_s:g} s"
                ) from None
            if message is grpc.aio.EOF:
                return
            if message is None:  # gRPC's word for bytes that it could not read
                raise PeerError(f"the coordinator at {self._link.address} sent what is no message")
            yield message

    def _send(self, request: pb.SessionRequest) -> None:
        self._outbox.put_nowait(request)

    def _hello(self) -> pb.Hello:
        hello = pb.Hello(
            agent_version=version_of("minga"),
            trains=self._trainer is not None,
            condition=wire.condition_to_wire(self._look()),
        )
        if self._participant is not None:
            hello.round_id = self._participant.round_id
        elif self._keepsakes is not None:
            hello.round_id = self._keepsakes.pending
        if self._models.refs:
            hello.model.CopyFrom(_report(self._models.refs[-1]))
        return hello

    async def _beat(self, outbox: Outbox) -> None:
        while True:
            self._resting_s = self._heartbeat_interval_s
            await asyncio.sleep(self._resting_s)
            beat = pb.Heartbeat(condition=wire.condition_to_wire(self._look()))
            outbox.put_nowait(pb.SessionRequest(heartbeat=beat))

    def _take(self, message: pb.SessionResponse) -> None:
        """Start what a message asks for; the stream is read on meanwhile."""
        match message.WhichOneof("body"):
            case "heartbeat" | "going_away" as kind:
                self._redial.note_window(getattr(message, kind).reconnect_window_ms)
            case "welcome":
                self._take_times(message.welcome)
            case "model_offer":
                self._spawn(self._take_model(message.model_offer), message.ByteSize())
            case "round_end":
                self._end_round(message.round_end)
            case "refusal":
                self._take_refusal(message.refusal)
            case _:
                self._spawn(self._take_step(message), message.ByteSize())

    def _spawn(self, work: Coroutine[Any, Any, None], num_bytes: int = 0) -> None:
        """Run something beside the stream; what goes wrong is logged, the agent lives on.

        Raises:
            PeerError: the messages that wait for an answer take more memory than they may.
        """
        task = asyncio.create_task(work)
        self._watch(task)
        self._pending_bytes += num_bytes
        task.add_done_callback(lambda _: self._forget(num_bytes))
        if self._pending_bytes > MAX_PENDING_BYTES:
            raise PeerError("the coordinator asks for more than this device can remember")

    def _forget(self, num_bytes: int) -> None:
        self._pending_bytes -= num_bytes

    def _watch(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, UnreachableError):
            _log.warning("%s", error)  # a round that still needs it asks again
        elif error is not None:
            _log.error("%s: %s", type(error).__name__, error, exc_info=error)

    # --- rounds ---

    async def _take_step(self, message: pb.SessionResponse) -> None:
        """Answer one step of a round."""
        outbox, round_id = self._outbox, wire.round_of(message)
        try:
            participant = self._participant_for(message, round_id)
            answer = await participant.answer(message)
        except UnreachableError as error:
            _log.warning("round %s waits for the link: %s", round_id, error)
            outbox.put_nowait(None)  # ends the stream: the coordinator asks again on the next one
            return
        except FederationError as error:
            _log.warning("round %s is refused: %s", printable(round_id), error)
            self._send(wire.withdrawal(round_id, str(error)))
            return
        if participant is not self._participant:
            return  # the round ended, or a new one began, while this step ran
        self._send(answer)
        if answer.WhichOneof("body") == "withdrawal":
            self._metrics.rounds.labels(result="withdrawn").inc()
            self._drop_participant()

    def _participant_for(self, message: pb.SessionResponse, round_id: str) -> Participant:
        """Give this device's part in a round; an invitation to a new one makes it.

        Raises:
            FederationError: this device is not in that round, or will not be.
        """
        if self._participant is not None and self._participant.round_id == round_id:
            return self._participant
        if message.WhichOneof("body") != "invite":
            # The agent was restarted in the middle: its secrets are gone, its neighbours' shares
            # let the round go on without it.
            raise PeerError("the device has no secrets of this round")
        if self._trainer is None:
            raise PeerError("the device does not train")
        self._drop_participant()
        self._participant = Participant(
            message.invite,
            identity=self._link.identity,
            trainer=self._trainer,
            download=partial(self._download, is_durable=False),
            upload=self._upload,
            metrics=self._metrics,
            keepsakes=self._keepsakes,
            allow_plain=self._allow_plain,
            min_noise=self._min_noise,
            min_summed=self._min_summed,
            queries=self._queries,
        )
        return self._participant

    def _drop_participant(self) -> None:
        if self._participant is not None:
            self._watch(self._participant.close())
            self._participant = None

    def _end_round(self, end: pb.RoundEnd) -> None:
        if self._keepsakes is not None:
            self._keepsakes.settle(end.round_id, counted=end.counted)
        if self._participant is None or self._participant.round_id != end.round_id:
            return
        result = "counted" if end.counted else "committed" if end.committed else "aborted"
        self._metrics.rounds.labels(result=result).inc()
        _log.info("round %s: %s %s", end.round_id, result, printable(end.reason))
        self._drop_participant()

    def _take_refusal(self, refusal: pb.Refusal) -> None:
        """Leave the round in which a message was refused: there is no other answer to give."""
        _log.warning("the coordinator refused a message: %s", printable(refusal.reason))
        if self._participant is not None and self._participant.round_id == refusal.round_id:
            self._metrics.rounds.labels(result="refused").inc()
            self._send(wire.withdrawal(refusal.round_id, "its answer was refused"))
            self._drop_participant()

    # --- bulk ---

    async def _download(self, digest: bytes, path: Path, *, is_durable: bool = True) -> None:
        async with self._link.channel() as channel:
            stub = transfer.BlobStub(channel)
            moved = await transfer.download(
                stub,
                digest,
                path,
                address=self._link.address,
                compress=self._capacity.packs("down"),
                is_durable=is_durable,
            )
        self._capacity.note("down", moved)

    async def _upload(self, digest: bytes, data: bytes | memoryview) -> None:
        async with self._link.channel() as channel:
            stub = transfer.BlobStub(channel)
            moved = await transfer.upload(
                stub,
                data,
                digest,
                address=self._link.address,
                compress=self._capacity.packs("up"),
                is_new=True,
            )
        self._capacity.note("up", moved)

    # --- models ---

    async def _restore_models(self) -> None:
        """Answer from the active slots; a model that does not run any more keeps none back."""
        for ref in await asyncio.to_thread(self._slots.active):
            try:
                await self._serve(ref)
            except InferenceError as error:
                _log.error("model %s is not served: %s", ref, error)

    async def _take_model(self, offer: pb.ModelOffer) -> None:
        """Fetch an offered version into the idle slot, test it, switch to it, say so.

        Offers take turns: two of one model would write into the same slot.
        """
        report = pb.ModelReport(name=offer.name, version=offer.version, digest=offer.digest)
        try:
            async with self._model_turn:
                await self._switch_to(offer)
            report.state = pb.MODEL_STATE_ACTIVE
        except UnreachableError as error:
            _log.warning("model %s waits for the link: %s", printable(offer.name), error)
            return  # offered again after the reconnect
        except (FederationError, InferenceError, OSError) as error:
            _log.error("model %s is refused: %s", printable(offer.name), error)
            report.state = pb.MODEL_STATE_FAILED
            report.detail = printable(str(error))
        self._send(pb.SessionRequest(model_report=report))

    async def _switch_to(self, offer: pb.ModelOffer) -> None:
        name, version, digest = offer.name, offer.version, offer.digest
        wire.check_model(name, version, digest)
        served = {(ref.name, ref.version, ref.sha256) for ref in self._models.refs}
        if (name, version, digest.hex()) in served:
            return
        path = await asyncio.to_thread(self._slots.idle_path, name)
        await self._download(digest, path)
        await self._serve(await asyncio.to_thread(self._slots.activate, name, version, digest))

    async def _serve(self, ref: ModelRef) -> None:
        """Serve a version in its predecessor's place."""
        refs = {other.name: other for other in self._models.refs} | {ref.name: ref}
        await asyncio.to_thread(self._models.apply, tuple(refs.values()))
        self._metrics.model.clear()
        for name, served in refs.items():
            self._metrics.model.labels(name=name, version=served.version).set(1)


async def _comes_before(event: asyncio.Event, task: asyncio.Task[None]) -> bool:
    """Wait for the first of both; True if it was the event."""
    wait = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({wait, task}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        wait.cancel()
    return not task.done()


async def _drain(outbox: Outbox) -> AsyncIterator[pb.SessionRequest]:
    """Give what is to be sent, until a None ends the stream."""
    while (request := await outbox.get()) is not None:
        yield request


def _report(ref: ModelRef) -> pb.ModelReport:
    return pb.ModelReport(
        name=ref.name,
        version=ref.version,
        digest=bytes.fromhex(ref.sha256),
        state=pb.MODEL_STATE_ACTIVE,
    )
