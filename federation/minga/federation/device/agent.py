"""The agent: one control stream to the coordinator, kept open for as long as the device is up.

It connects out only. A broken link is dialled again, later each time and somewhat at random; the
local model goes on answering meanwhile.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Coroutine
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minga.federation import transfer, transport, wire
from minga.federation.device.metrics import Metrics
from minga.federation.device.participant import Participant
from minga.federation.device.slots import ModelSlots
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.errors import (
    AccessError,
    FederationError,
    IdentityError,
    PeerError,
    UnreachableError,
)
from minga.federation.identity import Identity
from minga.federation.limits import HEARTBEAT_INTERVAL_S, MAX_RECONNECT_BACKOFF_S
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from minga.inference.engine import ModelRef
from minga.inference.repository import ModelRepository

_log = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.2


class Agent:
    """One device at work.

    Args:
        identity: who this device is.
        address: the coordinator's device port, `host:port`.
        trainer: what trains here; None for a device that only runs models.
        slots: where models are kept.
        models: what the local inference server answers from.
        metrics: what Prometheus reads.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        address: str,
        trainer: TrainerProcess | None,
        slots: ModelSlots,
        models: ModelRepository,
        metrics: Metrics,
    ) -> None:
        self._identity = identity
        self._address = address
        self._trainer = trainer
        self._slots = slots
        self._models = models
        self._metrics = metrics
        self._participant: Participant | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._outbox: asyncio.Queue[pb.SessionRequest] = asyncio.Queue()
        self._channel = transport.open_channel(address, identity)
        self._blobs = pb_grpc.BlobServiceStub(self._channel)

    async def run(self) -> None:
        """Work until cancelled.

        Raises:
            AccessError: the coordinator refuses this device for good.
            IdentityError: this device's or the coordinator's certificate does not hold.
        """
        self._activate()
        backoff_s = _FIRST_BACKOFF_S
        try:
            while True:
                try:
                    await self._session()
                    backoff_s = _FIRST_BACKOFF_S
                    _log.info("the coordinator closed the stream")
                except (AccessError, IdentityError):
                    raise
                except FederationError as error:
                    _log.warning("%s", error)
                await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))  # noqa: S311
                backoff_s = min(2 * backoff_s, MAX_RECONNECT_BACKOFF_S)
        finally:
            await self._close()

    async def _close(self) -> None:
        self._drop_participant()
        for task in self._tasks:
            task.cancel()
        if self._trainer is not None:
            await self._trainer.close()
        await self._channel.close()

    # --- the stream ---

    async def _session(self) -> None:
        """Open one stream and serve it until it ends."""
        self._outbox = asyncio.Queue()
        self._send(pb.SessionRequest(hello=self._hello()))
        heart = asyncio.create_task(self._beat(self._outbox))
        try:
            with transport.calling(self._address):
                call = pb_grpc.FederationServiceStub(self._channel).Session(_drain(self._outbox))
                async for message in call:
                    self._take(message)
        finally:
            heart.cancel()
            self._metrics.connected.set(0)

    def _send(self, request: pb.SessionRequest) -> None:
        self._outbox.put_nowait(request)

    def _hello(self) -> pb.Hello:
        hello = pb.Hello(agent_version=version("minga"), trains=self._trainer is not None)
        if self._participant is not None:
            hello.round_id = self._participant.round_id
        active = self._slots.active()
        if active:
            hello.model.CopyFrom(_report(active[-1]))
        return hello

    async def _beat(self, outbox: asyncio.Queue[pb.SessionRequest]) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)
            outbox.put_nowait(pb.SessionRequest(heartbeat=pb.Heartbeat()))

    def _take(self, message: pb.SessionResponse) -> None:
        """Start what a message asks for; the stream is read on meanwhile."""
        match message.WhichOneof("body"):
            case "welcome":
                self._metrics.connected.set(1)
                _log.info("connected to %s as %s", self._address, self._identity.name)
            case "heartbeat":
                pass
            case "model_offer":
                self._spawn(self._take_model(message.model_offer))
            case "round_end":
                self._end_round(message.round_end)
            case "refusal":
                self._take_refusal(message.refusal)
            case _:
                self._spawn(self._take_step(message))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside the stream; what goes wrong is logged, the agent lives on."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: %s", type(error).__name__, error, exc_info=error)

    # --- rounds ---

    async def _take_step(self, message: pb.SessionResponse) -> None:
        """Answer one step of a round."""
        round_id = wire.round_of(message)
        if message.WhichOneof("body") == "invite":
            self._join(message.invite)
        participant = self._participant
        if participant is None or participant.round_id != round_id:
            # The agent was restarted in the middle: its secrets are gone, its neighbours' shares
            # let the round go on without it.
            self._send(wire.withdrawal(round_id, "the device lost this round's secrets"))
            return
        try:
            answer = await participant.answer(message)
        except UnreachableError as error:
            _log.warning("round %s waits for the link: %s", round_id, error)
            return  # asked again after the reconnect
        if participant is not self._participant:
            return  # the round ended, or a new one began, while this step ran
        self._send(answer)
        if answer.WhichOneof("body") == "withdrawal":
            self._metrics.rounds.labels(result="withdrawn").inc()
            self._drop_participant()

    def _join(self, invite: pb.RoundInvite) -> None:
        if self._participant is not None and self._participant.round_id == invite.round_id:
            return
        self._drop_participant()
        if self._trainer is None:
            return
        try:
            self._participant = Participant(
                invite,
                identity=self._identity,
                trainer=self._trainer,
                download=self._download,
                upload=self._upload,
                metrics=self._metrics,
            )
        except (PeerError, ValueError) as error:
            _log.warning("round %s is refused: %s", invite.round_id, error)

    def _drop_participant(self) -> None:
        if self._participant is not None:
            self._participant.close()
            self._participant = None

    def _end_round(self, end: pb.RoundEnd) -> None:
        if self._participant is None or self._participant.round_id != end.round_id:
            return
        result = "counted" if end.counted else "committed" if end.committed else "aborted"
        self._metrics.rounds.labels(result=result).inc()
        _log.info("round %s: %s %s", end.round_id, result, end.reason)
        self._drop_participant()

    def _take_refusal(self, refusal: pb.Refusal) -> None:
        _log.warning("the coordinator refused a message: %s", refusal.reason)
        if self._participant is not None and self._participant.round_id == refusal.round_id:
            self._metrics.rounds.labels(result="refused").inc()
            self._drop_participant()

    # --- bulk ---

    async def _download(self, digest: bytes, path: Path) -> None:
        await transfer.download(self._blobs, digest, path, address=self._address)

    async def _upload(self, digest: bytes, data: bytes) -> None:
        await transfer.upload(self._blobs, data, digest, address=self._address)

    # --- models ---

    async def _take_model(self, offer: pb.ModelOffer) -> None:
        """Fetch an offered version into the idle slot, test it, switch to it, say so."""
        report = pb.ModelReport(name=offer.name, version=offer.version, digest=offer.digest)
        try:
            path = self._slots.idle_path(offer.name)
            await self._download(offer.digest, path)
            self._slots.activate(offer.name, offer.version, offer.digest)
            self._activate()
            report.state = pb.MODEL_STATE_ACTIVE
        except FederationError as error:
            _log.error("model %s %s is refused: %s", offer.name, offer.version, error)
            report.state = pb.MODEL_STATE_FAILED
            report.detail = str(error)
        self._send(pb.SessionRequest(model_report=report))

    def _activate(self) -> None:
        """Answer from the active slots."""
        refs = self._slots.active()
        self._models.apply(refs)
        self._metrics.model.clear()
        for ref in refs:
            self._metrics.model.labels(name=ref.name, version=ref.version).set(1)


async def _drain(outbox: asyncio.Queue[pb.SessionRequest]) -> AsyncIterator[pb.SessionRequest]:
    while True:
        yield await outbox.get()


def _report(ref: ModelRef) -> pb.ModelReport:
    return pb.ModelReport(
        name=ref.name,
        version=ref.version,
        digest=bytes.fromhex(ref.sha256),
        state=pb.MODEL_STATE_ACTIVE,
    )
