"""A coordinator's inner part and its devices in one process, without sockets, for tests.

Store, blobs, hub, campaigns, participants and secure aggregation are the real ones. Only the wire
between them is short: a connection's outbox is read here and what a device answers is handed over.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from minga.federation import wire
from minga.federation.audit import AUDITOR
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.audit_log import AuditLog
from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.campaigns import Campaigns
from minga.federation.coordinator.hub import Connection, Hub, Signal
from minga.federation.coordinator.metrics import Metrics
from minga.federation.coordinator.store import EventRow, Store
from minga.federation.device.keepsakes import Keepsakes
from minga.federation.device.metrics import Metrics as DeviceMetrics
from minga.federation.device.participant import Participant
from minga.federation.device.queries import NO_QUERIES
from minga.federation.device.trainer_process import TrainedUpdate
from minga.federation.errors import FederationError, PeerError, StorageError, UnreachableError
from minga.federation.identity import CertificateVerifier, Identity, Role, make_csr, new_key
from minga.federation.parameters import ParameterFile, Parameters, from_bytes, read_layout, to_bytes
from minga.federation.trainer import TrainingConfig
from minga.federation.v1 import federation_pb2 as pb

PATIENCE_S = 30.0


class Killed(BaseException):
    """The coordinator's process ends here, without a chance to clean up."""


class Lives:
    """Counts the writes until a process is killed."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.killed = asyncio.Event()

    def take(self) -> None:
        """Live through one more write, or not."""
        if self.left == 0:
            self.killed.set()
            raise Killed
        self.left -= 1


class MortalConnection:
    """A database connection whose process is killed before one of its writes."""

    def __init__(self, connection: sqlite3.Connection, lives: Lives) -> None:
        self.connection = connection
        self.lives = lives

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        if not sql.startswith(("SELECT", "UPDATE devices")):  # what devices say is no state
            self.lives.take()
        return self.connection.execute(sql, values)

    def __enter__(self) -> None:
        self.connection.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.connection.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


class ForgetfulStore(Store):
    """A store whose disk forgets, when the power goes, what it was not told to keep for good."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.afloat: list[tuple[str, EventRow]] = []

    def append_event(self, round_id: str, row: EventRow) -> None:
        """Keep an event where a loss of power loses it."""
        self.afloat.append((round_id, row))

    def sync(self) -> None:
        """Keep for good what is not yet."""
        while self.afloat:
            super().append_event(*self.afloat[0])
            del self.afloat[0]
        super().sync()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Keep what came before, as the order of the log has it."""
        self.sync()
        with super().transaction():
            yield


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


def constant_update(model: Path, value: float, num_examples: int) -> TrainedUpdate:
    """Give an update that moves every value of a model alike."""
    layout = read_layout(model)
    vector = np.full(layout.num_values, value, np.float32)
    return TrainedUpdate(layout=layout, vector=vector, num_examples=num_examples, metrics={})


class StepTrainer:
    """Moves every value by `step`, counting as `num_examples`; waits while its gate is closed."""

    def __init__(self, step: float, num_examples: int) -> None:
        self.step = step
        self.num_examples = num_examples
        self.gate = asyncio.Event()
        self.gate.set()

    async def fit(self, model: Path, config: TrainingConfig) -> TrainedUpdate:
        await self.gate.wait()
        return constant_update(model, self.step, self.num_examples)

    async def evaluate(self, model: Path, config: TrainingConfig) -> dict[str, float]:
        await self.gate.wait()
        mean = float(np.mean([value.mean() for value in ParameterFile.open(model).tensors()]))
        return {"mean": mean, "step": self.step, "num_examples": self.num_examples}


class DeskDevice:
    """One device; its part in a round outlives the coordinator."""

    def __init__(self, identity: Identity, trainer: Any, folder: Path, group: str) -> None:
        self.identity = identity
        self.group = group
        self.keepsakes = Keepsakes(folder)
        self.queries = NO_QUERIES
        self.dies_at = ""
        """The step at which this device is killed, once: it forgets what is only in its memory."""
        self.dies_with_pending = False
        """Whether it has written down by then what it would keep of the round."""
        self.trainer = trainer
        self.participant: Participant | None = None
        self.download_errors: list[Exception] = []
        self._ends: dict[str, pb.RoundEnd] = {}
        self._told = Signal()

    async def answer(self, desk: "Desk", message: pb.SessionResponse) -> pb.SessionRequest | None:
        """Do what a message asks for."""
        if message.WhichOneof("body") == self.dies_at:
            self.dies_at = ""
            async with asyncio.timeout(PATIENCE_S):
                while self.dies_with_pending and not self.keepsakes.pending:
                    await asyncio.sleep(0.01)
            self.leave(None)
            raise UnreachableError("killed")
        match message.WhichOneof("body"):
            case "round_end":
                self.leave(message.round_end)
                return None
            case "invite" if not self.is_in(message.invite.round_id):
                try:
                    self.join(desk, message.invite)
                except FederationError as error:
                    return wire.withdrawal(message.invite.round_id, str(error))
        if not self.is_in(wire.round_of(message)):
            return wire.withdrawal(wire.round_of(message), "no secrets")
        participant = self.participant
        assert participant is not None
        answer = await participant.answer(message)
        return answer if participant is self.participant else None

    def is_in(self, round_id: str) -> bool:
        return self.participant is not None and self.participant.round_id == round_id

    def join(self, desk: "Desk", invite: pb.RoundInvite) -> None:
        async def download(digest: bytes, path: Path) -> None:
            if self.download_errors:
                raise self.download_errors.pop()
            path.write_bytes(desk.blobs.read(digest))

        async def upload(digest: bytes, data: bytes | memoryview) -> None:
            assert desk.campaigns.expects_upload(self.identity.name, digest, len(data))
            desk.put(digest, bytes(data), self.identity.name)

        self.leave(None)
        self.participant = Participant(
            invite,
            identity=self.identity,
            trainer=self.trainer,  # type: ignore[arg-type]
            download=download,
            upload=upload,
            metrics=DeviceMetrics(),
            keepsakes=self.keepsakes,
            allow_plain=True,
            queries=self.queries,
        )

    def leave(self, end: pb.RoundEnd | None) -> None:
        if end is not None:
            self.keepsakes.settle(end.round_id, counted=end.counted)
            self._ends[end.round_id] = end
            self._told.fire()
        if self.participant is not None and (end is None or self.is_in(end.round_id)):
            self.participant.close()
            self.participant = None

    async def end_of(self, round_id: str) -> pb.RoundEnd:
        """Wait until this device was told how a round ended."""
        async with asyncio.timeout(PATIENCE_S):
            while round_id not in self._ends:
                await self._told.next().wait()
        return self._ends[round_id]


class Desk:
    """A coordinator that can be killed and started again, and its devices."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self.clock = clock
        self.authority = Authority.open(folder / "authority")
        self.auditor = self._identity(Role.SERVICE, AUDITOR)
        self.grace_s = 5.0
        self.make_store: type[Store] = Store
        self.devices: dict[str, DeskDevice] = {}
        self.tasks: list[asyncio.Task[None]] = []

    def enrol(self, name: str, step: float, num_examples: int = 100) -> None:
        """Make a device."""
        self.hire(name, StepTrainer(step, num_examples))

    def hire(self, name: str, trainer: Any, group: str = "default") -> None:
        """Make a device that learns in a way of its own."""
        identity = self._identity(Role.DEVICE, name)
        self.devices[name] = DeskDevice(identity, trainer, self.folder / "devices" / name, group)

    def _identity(self, role: Role, name: str) -> Identity:
        key = new_key()
        certificate = self.authority.issue_client(role, name, make_csr(key, name))
        return Identity.of(key, certificate, self.authority.certificate)

    def start(self, lives: int | None = None) -> None:
        """Start the coordinator; with `lives` it is killed after so many writes."""
        self.store = self.make_store(self.folder / "coordinator.db")
        for name, device in self.devices.items():
            self.store.register_device(name, device.group, name.encode(), self.clock())
        audit = AuditLog(self.store, signer=lambda: self.auditor)
        if lives is not None:
            self.lives = Lives(lives)
            mortal = (
                MortalConnection(c, self.lives) for c in (self.store.connection, self.store._lazy)
            )
            self.store.connection, self.store._lazy = mortal  # type: ignore[assignment]
        self.blobs = BlobStore(self.folder / "blobs")
        self.hub = Hub(self.clock)
        self.campaigns = Campaigns(
            store=self.store,
            blobs=self.blobs,
            hub=self.hub,
            verifier=CertificateVerifier(authority=self.authority.certificate),
            clock=self.clock,
            metrics=Metrics(),
            audit=audit,
            reconnect_grace_s=self.grace_s,
        )
        self._spawn(self.campaigns.run)

    def hold_training(self) -> None:
        """Let no device's training end, until its gate is set."""
        for device in self.devices.values():
            device.trainer.gate.clear()

    def release_training(self) -> None:
        """Let training end."""
        for device in self.devices.values():
            device.trainer.gate.set()

    def connect(self, *names: str) -> None:
        """Open devices' streams."""
        for name in names or self.devices:
            device = self.devices[name]
            connection = Connection(name, device.group, trains=True)
            round_id = (
                device.participant.round_id if device.participant else device.keepsakes.pending
            )
            self.store.note_hello(name, trains=True, agent_version="", at=self.clock())
            opening = self.campaigns.greeting(name, round_id)
            self.hub.join(connection)
            self._spawn(self._serve, device, connection, opening)

    async def _serve(
        self, device: DeskDevice, connection: Connection, opening: list[pb.SessionResponse]
    ) -> None:
        for message in opening:
            assert await device.answer(self, message) is None
        while (message := await connection.outbox.get()) is not None:
            self._spawn(self._reply, device, connection, message)

    async def _reply(
        self, device: DeskDevice, connection: Connection, message: pb.SessionResponse
    ) -> None:
        """Hand an answer over; others come meanwhile, as with an agent."""
        try:
            answer = await device.answer(self, message)
            if answer is not None:
                round_id, event = wire.event_from_wire(connection.device_id, answer)
                self.campaigns.take(event, round_id, answer.ByteSize())
        except (StorageError, UnreachableError):
            self.hub.drop(connection.device_id)
        except PeerError as error:
            if "left this round" not in str(error):  # it is being told that it is out
                raise

    async def until_connected(self, count: int) -> None:
        """Wait until so many devices have a stream."""
        async with asyncio.timeout(PATIENCE_S):
            while len(self.hub) != count:
                await self.hub.changed.next().wait()

    def _spawn(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        async def until_killed() -> None:
            with suppress(Killed):
                await work(*arguments)

        self.tasks.append(asyncio.create_task(until_killed()))

    def fail_to(self, write: str) -> None:
        """Let the database refuse a kind of write, for instance `INSERT ON rounds`."""
        self.store.connection.execute(
            f"CREATE TRIGGER broken BEFORE {write} BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )

    def recover(self) -> None:
        """Let the database take everything again."""
        self.store.connection.execute("DROP TRIGGER broken")
        self.campaigns.changed.fire()

    async def stop(self) -> None:
        """End the coordinator, killed or not; devices keep what they hold."""
        for task in self.tasks:
            task.cancel()
        results = await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()
        self.store.close()
        errors = [r for r in results if isinstance(r, Exception)]
        assert not errors, errors

    def put(self, digest: bytes, data: bytes, sender: str) -> None:
        """Upload a blob."""
        with self.blobs.begin(digest, size=len(data), sender=sender) as upload:
            upload.append(upload.offset, data[upload.offset :])
            upload.finish()

    def start_campaign(self, plan: pb.CampaignPlan, model: Parameters) -> str:
        """Start a campaign from a model."""
        if not plan.HasField("query"):
            plan.model_digest = self.blobs.put_bytes(to_bytes(model))
        return self.campaigns.start(plan, "operator/operator").campaign_id

    async def finish(self, campaign_id: str) -> pb.Campaign:
        """Wait for a campaign's end."""
        last = pb.Campaign()
        async with asyncio.timeout(PATIENCE_S):
            async for campaign in self.campaigns.watch(campaign_id):
                last = campaign
        return last

    async def reach(self, campaign_id: str, stage: "pb.RoundStage") -> pb.Campaign:
        """Wait until the newest round is in a stage."""
        async with asyncio.timeout(PATIENCE_S):
            async for campaign in self.campaigns.watch(campaign_id):
                if campaign.rounds and campaign.rounds[-1].stage == stage:
                    return campaign
        raise AssertionError("the campaign ended before")

    async def finish_over_a_kill(
        self, plan: pb.CampaignPlan, model: Parameters, lives: int
    ) -> tuple[pb.Campaign, bool]:
        """Run a campaign whose coordinator is killed before its `lives`-th next write.

        Returns:
            The campaign as it ended after a restart, and whether the kill came before that.
        """
        campaign_id = self.start_campaign(plan, model)
        await self.stop()
        self.start(lives)
        self.connect()
        killed = asyncio.create_task(self.lives.killed.wait())
        ended = asyncio.create_task(self.finish(campaign_id))
        await asyncio.wait([killed, ended], return_when=asyncio.FIRST_COMPLETED)
        was_killed = killed.done()
        for task in (killed, ended):
            task.cancel()
        await self.stop()
        self.start()
        self.connect()
        campaign = await self.finish(campaign_id)
        assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, (lives, campaign.reason)
        return campaign, was_killed

    def moved(self, campaign: pb.Campaign, model: Parameters) -> dict[str, np.ndarray]:
        """Say by how much a campaign moved its model."""
        result = from_bytes(self.blobs.read(campaign.model_digest))
        return {name: result[name] - value for name, value in model.items()}
