"""The agent against a coordinator that lies, hangs, or asks for two things at once."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from hashlib import sha256
from pathlib import Path

import grpc
import onnx
import pytest

from minga.federation import transfer
from minga.federation.device.agent import Agent
from minga.federation.device.link import Link
from minga.federation.device.metrics import Metrics
from minga.federation.device.slots import ModelSlots
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.parameters import to_bytes
from minga.federation.secagg.plan import derive_plan
from minga.federation.transfer import digest_of
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from minga.federation.wire import plan_to_wire
from minga.inference.repository import ModelRepository
from tests.federation.conftest import AddServices, Issue, Serve
from tests.federation.fleet import PATIENCE_S, TRAINERS, toy_model
from tests.federation.test_federation import add_one_model

RunAgent = Callable[..., AbstractAsyncContextManager[asyncio.Task[None]]]
SESSION = "/minga.federation.v1.FederationService/Session"
WELCOME = pb.SessionResponse(welcome=pb.Welcome(heartbeat_interval_ms=60_000))
MODEL = to_bytes(toy_model())


class Stream:
    """One stream as a scripted coordinator holds it."""

    def __init__(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        self.requests = requests
        self.outbox: asyncio.Queue[pb.SessionResponse | None] = asyncio.Queue()

    def say(self, *messages: pb.SessionResponse | None) -> None:
        """Send messages; None ends the stream."""
        for message in messages:
            self.outbox.put_nowait(message)

    async def hear(self) -> pb.SessionRequest:
        """Wait for the agent's next word."""
        return await asyncio.wait_for(anext(self.requests), PATIENCE_S)


class ScriptedCoordinator(pb_grpc.FederationServiceServicer, pb_grpc.BlobServiceServicer):
    """Says what a test tells it to, and gives blobs to everybody."""

    def __init__(self) -> None:
        self.streams: asyncio.Queue[Stream] = asyncio.Queue()
        self.blobs = {digest_of(MODEL): MODEL}
        self.downloads: list[bytes] = []
        self.is_reachable = asyncio.Event()
        self.is_reachable.set()
        self.num_broken = 0

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: object
    ) -> AsyncIterator[pb.SessionResponse]:
        stream = Stream(request_iterator)
        self.streams.put_nowait(stream)
        while (message := await stream.outbox.get()) is not None:
            yield message

    async def Download(  # noqa: N802
        self, request: pb.DownloadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.DownloadResponse]:
        self.downloads.append(request.digest)
        if not self.is_reachable.is_set():
            try:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            finally:
                self.num_broken += 1
        if request.digest not in self.blobs:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such blob")
        blob = self.blobs[request.digest]
        yield pb.DownloadResponse(chunk=blob[request.offset :], size=len(blob))

    def add_blobs(self, *blobs: bytes) -> None:
        """Let blobs be downloaded."""
        self.blobs.update((digest_of(blob), blob) for blob in blobs)

    async def stream(self) -> tuple[Stream, pb.Hello]:
        """Wait for the agent's next stream, and greet it."""
        stream = await asyncio.wait_for(self.streams.get(), PATIENCE_S)
        hello = (await stream.hear()).hello
        stream.say(WELCOME)
        return stream, hello

    def add_services(self, server: grpc.aio.Server) -> None:
        pb_grpc.add_FederationServiceServicer_to_server(self, server)
        pb_grpc.add_BlobServiceServicer_to_server(self, server)


@pytest.fixture
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator()


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> TrainerProcess:
    """Training that takes for ever."""
    monkeypatch.setenv("PYTHONPATH", str(TRAINERS))
    return TrainerProcess("constant_trainer:make", {"delay_s": 600.0})


@pytest.fixture
def run_agent(serve: Serve, issue: Issue, tmp_path: Path) -> RunAgent:
    """Runs an agent against a coordinator's services."""

    @asynccontextmanager
    async def run(
        add_services: AddServices, trainer: TrainerProcess | None = None
    ) -> AsyncIterator[asyncio.Task[None]]:
        agent = Agent(
            link=Link(await serve(add_services), issue("site-0"), keep=lambda identity: None),
            trainer=trainer,
            slots=ModelSlots(tmp_path / "models"),
            models=ModelRepository(),
            metrics=Metrics(),
        )
        task = asyncio.create_task(agent.run())
        yield task
        task.cancel()
        await asyncio.wait([task])

    return run


def invite_of(number: int, **changes: object) -> pb.RoundInvite:
    """An invitation to a round of three."""
    plan = derive_plan(
        round_id=bytes([number]) * 16,
        context_digest=bytes(32),
        num_values=1007,
        cohort_size=3,
        clip=1.0,
        value_bits=16,
        max_weight=10,
        expected_dropout=0.0,
        colluder_share=0.0,
    )
    values = {
        "round_id": plan.round_id.hex(),
        "plan": plan_to_wire(plan),
        "model_digest": digest_of(MODEL),
    }
    return pb.RoundInvite(**{**values, **changes})  # type: ignore[arg-type]


ROUND = invite_of(1).round_id
LONG = "x" * 10**6


def with_plan(**changes: object) -> pb.SessionResponse:
    invite = invite_of(1)
    for name, value in changes.items():
        setattr(invite.plan, name, value)
    return pb.SessionResponse(invite=invite)


STRANGE = pb.SessionResponse(neighbour_keys=pb.NeighbourKeys(round_id="ff" * 16))

LIES = {
    "an unknown round": pb.SessionResponse(neighbour_keys=pb.NeighbourKeys(round_id=ROUND)),
    "a long round": pb.SessionResponse(survivors=pb.Survivors(round_id=LONG)),
    "two rounds": pb.SessionResponse(invite=invite_of(1, round_id="00" * 16)),
    "no plan": pb.SessionResponse(invite=pb.RoundInvite(round_id=ROUND)),
    "a short digest": pb.SessionResponse(invite=invite_of(1, model_digest=b"short")),
    "no value": pb.SessionResponse(invite=invite_of(1, training={"lr": pb.Value()})),
    "a pair": with_plan(max_cohort=2, num_neighbours=1, threshold=1),
    "a low threshold": with_plan(threshold=1),
    "many bits": with_plan(value_bits=2**31),
    "no clip": with_plan(clip=float("nan")),
    "a bad offer": pb.SessionResponse(
        model_offer=pb.ModelOffer(name="../../etc", version="1", digest=bytes(32))
    ),
    "a bad version": pb.SessionResponse(
        model_offer=pb.ModelOffer(name="m", version=LONG, digest=bytes(32))
    ),
    "a long offer": pb.SessionResponse(
        model_offer=pb.ModelOffer(name="m", version="1", digest=bytes(10**6))
    ),
    "no such blob": pb.SessionResponse(
        model_offer=pb.ModelOffer(name="m", version="1", digest=bytes(32))
    ),
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_lies_are_answered(
    coordinator: ScriptedCoordinator,
    run_agent: RunAgent,
    trainer: TrainerProcess,
    lie: pb.SessionResponse,
) -> None:
    """What a lying coordinator asks for is refused at once, in a few words, and that is all."""
    async with run_agent(coordinator.add_services, trainer):
        stream, _ = await coordinator.stream()
        stream.say(lie)
        answer = await stream.hear()
        if lie.HasField("model_offer"):
            assert answer.model_report.state == pb.MODEL_STATE_FAILED
            assert answer.model_report.detail
            assert len(answer.model_report.detail) <= 500
        else:
            assert answer.withdrawal.reason
            assert len(answer.withdrawal.reason) <= 500
        await assert_alive(stream)


async def test_words_without_an_answer(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, caplog: pytest.LogCaptureFixture
) -> None:
    """Ends of rounds that never were, refusals and greetings out of place change nothing."""
    async with run_agent(coordinator.add_services):
        stream, _ = await coordinator.stream()
        stream.say(
            WELCOME,
            pb.SessionResponse(round_end=pb.RoundEnd(round_id=LONG, reason=LONG)),
            pb.SessionResponse(refusal=pb.Refusal(round_id=LONG, reason="\x1b" + LONG)),
            pb.SessionResponse(heartbeat=pb.Heartbeat()),
        )
        await assert_alive(stream)
    assert max(len(record.getMessage()) for record in caplog.records) < 1000


async def assert_alive(stream: Stream) -> None:
    """The agent answers on the same stream."""
    keys = pb.NeighbourKeys(round_id="ff" * 16)
    stream.say(pb.SessionResponse(neighbour_keys=keys))
    assert (await stream.hear()).withdrawal.round_id == "ff" * 16


async def test_steps_out_of_order(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, trainer: TrainerProcess
) -> None:
    """A step that the protocol does not allow yet takes the device out of the round."""
    async with run_agent(coordinator.add_services, trainer):
        stream, _ = await coordinator.stream()
        stream.say(pb.SessionResponse(invite=invite_of(1)))
        assert (await stream.hear()).key_advert.round_id == ROUND
        stream.say(pb.SessionResponse(confirmations=pb.Confirmations(round_id=ROUND)))
        assert "StateError" in (await stream.hear()).withdrawal.reason
        await assert_alive(stream)


async def test_flood(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, trainer: TrainerProcess
) -> None:
    """A coordinator that asks for more than a device can remember is hung up on."""
    shares = [pb.EncryptedShare(sender="x" * 10**6)] * 3
    async with run_agent(coordinator.add_services, trainer):
        stream, _ = await coordinator.stream()
        stream.say(pb.SessionResponse(invite=invite_of(1)))
        await stream.hear()
        neighbour_shares = pb.NeighbourShares(round_id=ROUND, shares=shares)
        stream.say(*[pb.SessionResponse(neighbour_shares=neighbour_shares)] * 20)
        await coordinator.stream()


async def test_refused_device_leaves_the_round(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, trainer: TrainerProcess
) -> None:
    """A device whose answer was refused says that it leaves, so that nobody waits for it."""
    async with run_agent(coordinator.add_services, trainer):
        stream, _ = await coordinator.stream()
        stream.say(pb.SessionResponse(invite=invite_of(1)))
        assert (await stream.hear()).WhichOneof("body") == "key_advert"
        stream.say(pb.SessionResponse(refusal=pb.Refusal(round_id=ROUND, reason="no")))
        assert (await stream.hear()).withdrawal.round_id == ROUND


async def test_newer_round_replaces_the_older(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, trainer: TrainerProcess
) -> None:
    """Invited to a second round, a device drops the first one, its training too."""
    async with run_agent(coordinator.add_services, trainer):
        stream, _ = await coordinator.stream()
        stream.say(*(pb.SessionResponse(invite=invite_of(number)) for number in (1, 2)))
        adverts = [(await stream.hear()).key_advert.round_id for _ in range(2)]
        assert invite_of(2).round_id in adverts
        stream.say(pb.SessionResponse(neighbour_keys=pb.NeighbourKeys(round_id=ROUND)))
        assert (await stream.hear()).withdrawal.round_id == ROUND
        stream.say(None)
        assert (await coordinator.stream())[1].round_id == invite_of(2).round_id


async def test_stopped_while_training(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, trainer: TrainerProcess
) -> None:
    """An agent that is stopped takes its training child along."""
    async with run_agent(coordinator.add_services, trainer):
        stream, _ = await coordinator.stream()
        stream.say(pb.SessionResponse(invite=invite_of(1)))
        async with asyncio.timeout(PATIENCE_S):
            while (pid := trainer.pid) is None:
                await asyncio.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# --- links ---


async def test_a_download_that_a_broken_link_stops_is_no_error(
    coordinator: ScriptedCoordinator,
    run_agent: RunAgent,
    trainer: TrainerProcess,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One line tells of it, without a traceback; the next round fetches its model again."""
    monkeypatch.setattr(transfer, "Retry", partial(transfer.Retry, attempts=2, first_delay_s=0.01))
    coordinator.is_reachable.clear()
    async with run_agent(coordinator.add_services, trainer):
        stream, _ = await coordinator.stream()
        stream.say(pb.SessionResponse(invite=invite_of(1)))
        assert (await stream.hear()).WhichOneof("body") == "key_advert"
        async with asyncio.timeout(PATIENCE_S):
            while coordinator.num_broken < 2:
                await asyncio.sleep(0.01)
        for _ in range(3):  # whoever answers after that has heard of it
            stream.say(STRANGE)
            await stream.hear()
        stream.say(pb.SessionResponse(round_end=pb.RoundEnd(round_id=ROUND)))
        coordinator.is_reachable.set()
        stream.say(pb.SessionResponse(invite=invite_of(2)))
        assert (await stream.hear()).WhichOneof("body") == "key_advert"
        async with asyncio.timeout(PATIENCE_S):
            while trainer.pid is None or len(coordinator.downloads) < 3:
                await asyncio.sleep(0.01)
    told = [record for record in caplog.records if "gone" in record.message]
    assert [(record.levelname, record.exc_info) for record in told] == [("WARNING", None)]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_bytes_that_are_no_message(run_agent: RunAgent) -> None:
    """A coordinator that sends garbage is dialled again."""
    sessions: asyncio.Queue[None] = asyncio.Queue()

    async def garbage(requests: object, context: object) -> AsyncIterator[bytes]:
        sessions.put_nowait(None)
        yield b"\xff\xff\xff"
        await asyncio.Event().wait()

    def add_services(server: grpc.aio.Server) -> None:
        handler = grpc.stream_stream_rpc_method_handler(garbage)
        service, method = SESSION[1:].split("/")
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(service, {method: handler})]
        )

    async with run_agent(add_services) as agent:
        for _ in range(2):
            await asyncio.wait_for(sessions.get(), PATIENCE_S)
        assert not agent.done()


async def test_silent_coordinator_is_dialled_again(
    coordinator: ScriptedCoordinator, run_agent: RunAgent
) -> None:
    """A coordinator that answers no heartbeat is given up after three, though its link stands."""
    async with run_agent(coordinator.add_services):
        stream = await asyncio.wait_for(coordinator.streams.get(), PATIENCE_S)
        stream.say(pb.SessionResponse(welcome=pb.Welcome(heartbeat_interval_ms=100)))
        await coordinator.stream()


async def test_streams_leave_nothing_behind(
    coordinator: ScriptedCoordinator, run_agent: RunAgent
) -> None:
    """However often a stream ends, the agent has the same tasks."""
    async with run_agent(coordinator.add_services):
        counts = []
        for _ in range(4):
            stream, _ = await coordinator.stream()
            await assert_alive(stream)
            counts.append(len(asyncio.all_tasks()))
            stream.say(None)
    assert counts[-1] == counts[0]


# --- models ---


def offer_of(version: str, model: bytes, name: str = "add-one") -> pb.SessionResponse:
    offer = pb.ModelOffer(name=name, version=version, digest=digest_of(model))
    return pb.SessionResponse(model_offer=offer)


async def test_offers_at_once(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, tmp_path: Path
) -> None:
    """Offers that come at once, of one model and of two, end in the newest of each."""
    first = add_one_model(tmp_path / "model.onnx")
    second = first + onnx.ModelProto(doc_string="another file").SerializeToString()
    coordinator.add_blobs(first, second)
    async with run_agent(coordinator.add_services):
        stream, _ = await coordinator.stream()
        stream.say(*(offer_of(str(n), (first, second)[n % 2]) for n in range(5)))
        stream.say(offer_of("1", second, "other"))
        reports = [(await stream.hear()).model_report for _ in range(6)]
    assert [report.version for report in reports] == ["0", "1", "2", "3", "4", "1"]
    assert {report.state for report in reports} == {pb.MODEL_STATE_ACTIVE}
    active = {
        ref.name: (ref.version, ref.sha256) for ref in ModelSlots(tmp_path / "models").active()
    }
    assert active == {
        "add-one": ("4", digest_of(first).hex()),
        "other": ("1", digest_of(second).hex()),
    }


async def test_known_model_is_not_fetched_again(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, tmp_path: Path
) -> None:
    """A version that is served already is reported, not fetched, when it is offered again."""
    model = add_one_model(tmp_path / "model.onnx")
    coordinator.add_blobs(model)
    async with run_agent(coordinator.add_services):
        stream, _ = await coordinator.stream()
        for _ in range(2):
            stream.say(offer_of("1", model))
            assert (await stream.hear()).model_report.state == pb.MODEL_STATE_ACTIVE
        stream.say(None)
        _, hello = await coordinator.stream()
    assert (hello.model.name, hello.model.version) == ("add-one", "1")
    assert coordinator.downloads == [digest_of(model)]


async def test_model_that_runs_no_more(
    coordinator: ScriptedCoordinator, run_agent: RunAgent, tmp_path: Path
) -> None:
    """A kept model that this machine cannot run any more keeps no other one from being served."""
    model = add_one_model(tmp_path / "model.onnx")
    slots = ModelSlots(tmp_path / "models")
    slots.idle_path("zeta").write_bytes(model)
    slots.activate("zeta", "1", digest_of(model))
    path = slots.idle_path("alpha")
    path.write_bytes(b"?")
    broken = {
        "name": "alpha",
        "version": "1",
        "path": str(path),
        "sha256": sha256(b"?").hexdigest(),
    }
    (tmp_path / "models" / "alpha" / "active.json").write_text(json.dumps(broken))
    async with run_agent(coordinator.add_services):
        _, hello = await coordinator.stream()
    assert hello.model.name == "zeta"


def test_device_folder_that_was_moved(tmp_path: Path) -> None:
    """A device finds its models again after its folder was moved."""
    model = add_one_model(tmp_path / "model.onnx")
    slots = ModelSlots(tmp_path / "old")
    slots.idle_path("add-one").write_bytes(model)
    slots.activate("add-one", "1", digest_of(model))
    (tmp_path / "old").rename(tmp_path / "new")
    models = ModelRepository()
    models.apply(ModelSlots(tmp_path / "new").active())
    (ref,) = models.refs
    assert Path(ref.path).read_bytes() == model


async def test_new_interval_on_an_open_stream(
    coordinator: ScriptedCoordinator, run_agent: RunAgent
) -> None:
    """A later welcome tells how often to beat; it holds after the next beat."""
    clock = asyncio.get_running_loop().time
    async with run_agent(coordinator.add_services):
        stream = await asyncio.wait_for(coordinator.streams.get(), PATIENCE_S)
        await stream.hear()
        stream.say(pb.SessionResponse(welcome=pb.Welcome(heartbeat_interval_ms=100)))
        await stream.hear()
        stream.say(pb.SessionResponse(welcome=pb.Welcome(heartbeat_interval_ms=600)))
        assert (await stream.hear()).WhichOneof("body") == "heartbeat"
        before = clock()
        assert (await stream.hear()).WhichOneof("body") == "heartbeat"
        assert clock() - before > 0.4
