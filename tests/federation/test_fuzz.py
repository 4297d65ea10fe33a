"""Garbage on every call, at full speed, while rounds go on.

All of it goes over real gRPC with mutual TLS to a coordinator process, most of it on control
streams, where a device can send the most.
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import grpc
import psutil
import pytest
from google.protobuf.message import Message

from minga.federation import transport
from minga.federation.errors import CampaignError, PeerError, PrivacyError
from minga.federation.identity import load_identity
from minga.federation.limits import MIB
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.exact import WEIGHTS, assert_sums_exact, exact_options, exact_plan
from tests.federation.fleet import PATIENCE_S, Fleet
from tests.federation.garbage import Garbage, is_heartbeat
from tests.federation.process_fleet import ProcessFleet

pytestmark = pytest.mark.slow

NUM_STREAM_MESSAGES = 192_000
NUM_CALL_MESSAGES = 9_000
MALLORIES = [f"mallory-{index}" for index in range(4)]
HONEST = list(WEIGHTS)[:4]

WINDOW = 40
"""Messages on a control stream before its answers are read: an outbox holds 64."""

MAX_GROWTH_BYTES = 24 * MIB
"""By how much the coordinator's memory may grow after it is warm. Leaking 130 bytes with each
message would be more."""

ANSWERS = {
    grpc.StatusCode.OK,  # what was damaged may still make sense
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""How a coordinator may end a call; INTERNAL or UNKNOWN would be its own failure."""

NOT_SENT = "Internal error from Core"
"""What grpc.aio's client itself says if the call ended while it was writing; the answer is lost."""

PACKAGE = "/minga.federation.v1."
SESSION, UPLOAD = "FederationService/Session", "BlobService/Upload"
ENROL = "EnrollmentService/Enroll"
HEARTBEAT = pb.SessionRequest(heartbeat=pb.Heartbeat()).SerializeToString()

CALLS: dict[str, type[Message]] = {
    ENROL: pb.EnrollRequest,
    "IdentityService/Renew": pb.RenewRequest,
    "BlobService/GetUploadOffset": pb.GetUploadOffsetRequest,
    "OperatorService/CreateToken": pb.CreateTokenRequest,
    "OperatorService/ListDevices": pb.ListDevicesRequest,
    "OperatorService/RevokeDevice": pb.RevokeDeviceRequest,
    "OperatorService/RevokeIdentity": pb.RevokeIdentityRequest,
    "OperatorService/StartCampaign": pb.StartCampaignRequest,
    "OperatorService/CancelCampaign": pb.CancelCampaignRequest,
    "OperatorService/PublishModel": pb.PublishModelRequest,
    "OperatorService/GetStatus": pb.GetStatusRequest,
}
STREAMED_ANSWERS: dict[str, type[Message]] = {
    "BlobService/Download": pb.DownloadRequest,
    "OperatorService/WatchCampaign": pb.WatchCampaignRequest,
}
STREAMED_REQUESTS: dict[str, type[Message]] = {
    UPLOAD: pb.UploadRequest,
    SESSION: pb.SessionRequest,
}
METHODS = {**CALLS, **STREAMED_ANSWERS, **STREAMED_REQUESTS}
"""Every call of every service, and what is sent on it."""


class Attack:
    """Sends garbage and keeps count of it and of its answers."""

    def __init__(self, seed: int) -> None:
        self.garbage = Garbage(seed)
        self.sent: Counter[str] = Counter()
        """Messages by call."""
        self.answers: Counter[str] = Counter()
        self.statuses: Counter[tuple[str, grpc.StatusCode]] = Counter()

    # --- control streams ---

    async def flood(self, channel: grpc.aio.Channel, count: int, *, trains: bool) -> None:
        """Send messages on one control stream, and read what comes of them."""
        call = channel.stream_stream(PACKAGE + SESSION)()
        hello = pb.SessionRequest(hello=pb.Hello(trains=trains))
        await call.write(hello.SerializeToString())
        pool: list[bytes] = []
        for start in range(0, count, WINDOW):
            if start % (50 * WINDOW) == 0:
                pool = self.garbage.pool([pb.SessionRequest], 300)
            batch = [self.garbage.any_of(pool) for _ in range(WINDOW)]
            num_heartbeats = 1 + sum(map(is_heartbeat, batch))
            for data in (*batch, HEARTBEAT):
                await call.write(data)
            self.sent[SESSION] += WINDOW
            await self._read(call, num_heartbeats)
        call.cancel()

    async def _read(
        self, call: "grpc.aio.StreamStreamCall[bytes, bytes]", num_heartbeats: int
    ) -> None:
        """Read until all heartbeats are answered: everything before them is, too."""
        while num_heartbeats:
            answer = await asyncio.wait_for(call.read(), PATIENCE_S)
            assert answer is not grpc.aio.EOF, f"the stream ended: {await call.code()}"
            response = pb.SessionResponse.FromString(answer)
            kind = response.WhichOneof("body")
            self.answers[kind] += 1
            num_heartbeats -= kind == "heartbeat"
            if kind == "refusal":
                assert response.refusal.reason
            if kind == "invite":
                self.garbage.known = [response.invite.round_id]

    # --- calls ---

    async def call(self, channel: grpc.aio.Channel, method: str, data: bytes) -> None:
        """Make a call with one request."""
        await self._note(method, channel.unary_unary(PACKAGE + method)(data, timeout=PATIENCE_S))

    async def read(self, channel: grpc.aio.Channel, method: str, data: bytes) -> None:
        """Make a call with one request and many answers."""

        async def read_all() -> None:
            async for _ in channel.unary_stream(PACKAGE + method)(data, timeout=PATIENCE_S):
                pass

        await self._note(method, read_all())

    async def upload(self, channel: grpc.aio.Channel, requests: Sequence[bytes]) -> None:
        """Make an upload's call with some requests."""
        call = channel.stream_unary(PACKAGE + UPLOAD)(timeout=PATIENCE_S)
        with suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):  # it ended meanwhile
            for request in requests:
                await call.write(request)
                await call.initial_metadata()  # comes with the answer to the first one
            self.sent[UPLOAD] += len(requests) - 1
            await call.done_writing()
        await self._note(UPLOAD, call)

    async def _note(self, method: str, call: Awaitable[object]) -> None:
        """Wait for a call's end and take down how it ended."""
        self.sent[method] += 1
        try:
            await call
            status, details = grpc.StatusCode.OK, "ok"
        except grpc.aio.AioRpcError as error:
            status, details = error.code(), error.details()
        if details == NOT_SENT:
            return
        assert status in ANSWERS, f"{method}: {status}: {details}"
        assert details, method
        self.statuses[method, status] += 1


Channels = dict[str, grpc.aio.Channel]


async def open_channels(stack: AsyncExitStack, fleet: ProcessFleet) -> Channels:
    """Open a channel for each mallory, one for an operator, and one of a stranger."""
    state = fleet.folder / "coordinator"
    folders = {"operator": state / "operator", **{n: fleet.folder / n for n in MALLORIES}}
    channels = {
        name: transport.open_channel(fleet.operator.address, load_identity(folder))
        for name, folder in folders.items()
    }
    authority = load_identity(folders["operator"]).authority
    channels["stranger"] = transport.open_pinned_channel(fleet.enrol_address, authority)
    for channel in channels.values():
        await stack.enter_async_context(channel)
    return channels


async def flood_streams(attack: Attack, channels: Channels, count: int) -> None:
    """Send garbage on all control streams at once; the first mallory is invited to rounds."""
    share = count // len(MALLORIES)
    async with asyncio.TaskGroup() as group:
        for name in MALLORIES:
            group.create_task(attack.flood(channels[name], share, trains=name == MALLORIES[0]))


async def flood_calls(attack: Attack, channels: Channels, count: int) -> None:
    """Send garbage on all other calls, as a device, as an operator, and as a stranger."""
    turns = asyncio.Queue[Callable[[], Awaitable[None]]]()
    for turn in turns_of(attack, channels, count):
        turns.put_nowait(turn)

    async def work() -> None:
        while not turns.empty():
            await turns.get_nowait()()

    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(work())


def turns_of(
    attack: Attack, channels: Channels, count: int
) -> Iterable[Callable[[], Awaitable[None]]]:
    """Give calls that send so many messages in all; some of them may be made at the same time."""
    garbage, chance = attack.garbage, attack.garbage.random
    kinds = {**CALLS, **STREAMED_ANSWERS}
    pools = {method: garbage.pool([kind], 100) for method, kind in kinds.items()}
    uploads = garbage.pool([pb.UploadRequest], 200)
    callers = [channels["operator"], channels["mallory-0"]]
    num_messages = 0
    while num_messages < count:
        channel = chance.choice(callers)
        method = chance.choice([*kinds, UPLOAD, UPLOAD])
        if method == UPLOAD:
            requests = [garbage.any_of(uploads)]
            if chance.random() < 0.5:
                header = pb.UploadHeader(digest=chance.randbytes(32), size=chance.randrange(5000))
                requests[0] = pb.UploadRequest(header=header).SerializeToString()
                if channel is channels["operator"]:  # it is taken, other than a device's
                    requests += [garbage.any_of(uploads) for _ in range(3)]
            num_messages += len(requests)
            yield lambda channel=channel, requests=requests: attack.upload(channel, requests)
            continue
        data = garbage.any_of(pools[method])
        num_messages += 1
        make = attack.read if method in STREAMED_ANSWERS else attack.call
        if method == ENROL:
            channel = channels["stranger"]
        yield lambda make=make, channel=channel, method=method, data=data: make(
            channel, method, data
        )


async def load_accounting(fleet: ProcessFleet) -> None:
    """Ask for a private campaign beyond its budget: what counts privacy is loaded for good."""
    plan = exact_plan(privacy=pb.Privacy(epsilon=1, delta=1e-5, noise_multiplier=1e-6, max_norm=1))
    with pytest.raises(PrivacyError):
        await fleet.start_campaign(plan)


async def run_rounds(fleet: ProcessFleet, is_over: asyncio.Event) -> int:
    """Run campaigns until the attack is over, and check each; gives how many rounds there were."""
    num_rounds = 0
    plan = {"cohort": 5, "min_cohort": 3, "stage_timeout_s": 5.0, "training_timeout_s": 10.0}
    while not is_over.is_set():
        campaign_id = await fleet.start_campaign(exact_plan(**plan, invite_timeout_s=5.0))
        campaign = await fleet.finish(campaign_id)
        await assert_sums_exact(fleet, campaign)
        num_rounds += 1
    return num_rounds


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[ProcessFleet]:
    """A coordinator process, four honest devices at work, and four that are not."""
    async with ProcessFleet(tmp_path) as fleet:
        for name in HONEST:
            await fleet.add(name, exact_options(name))
        for name in MALLORIES:
            await fleet.enrol(name)
        yield fleet


def test_every_call_is_attacked() -> None:
    """The calls here are those of the wire's services, one by one, with what each of them takes."""
    methods = [
        (f"{service.name}/{method.name}", method)
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    assert {name: method.input_type.name for name, method in methods} == {
        name: kind.DESCRIPTOR.name for name, kind in METHODS.items()
    }
    assert {name for name, m in methods if m.client_streaming} == STREAMED_REQUESTS.keys()
    answers_stream = {name for name, method in methods if method.server_streaming}
    assert answers_stream - {SESSION} == STREAMED_ANSWERS.keys()


async def test_garbage_on_every_call(fleet: ProcessFleet, chaos_seed: int) -> None:
    """Each garbage gets a typed answer, rounds stay exact, and memory stays flat."""
    attack, is_over = Attack(chaos_seed), asyncio.Event()
    process = psutil.Process(fleet.process.pid)
    async with AsyncExitStack() as stack, asyncio.TaskGroup() as group:
        await load_accounting(fleet)
        rounds = group.create_task(run_rounds(fleet, is_over))
        channels = await open_channels(stack, fleet)
        await flood_streams(attack, channels, NUM_STREAM_MESSAGES // 10)
        await flood_calls(attack, channels, NUM_CALL_MESSAGES // 10)
        before, num_files = process.memory_info().rss, process.num_fds()
        await flood_streams(attack, channels, NUM_STREAM_MESSAGES * 9 // 10)
        await flood_calls(attack, channels, NUM_CALL_MESSAGES * 9 // 10)
        growth = process.memory_info().rss - before
        is_over.set()
    num_sent = attack.sent.total()
    print(f"{num_sent} messages, {rounds.result()} rounds, {growth / MIB:+.1f} MiB")  # noqa: T201
    print(attack.answers, *sorted(attack.statuses.items(), key=str), sep="\n")  # noqa: T201
    assert num_sent >= 200_000
    assert attack.sent.keys() == METHODS.keys()
    assert min(attack.sent.values()) > 100, attack.sent
    assert attack.answers["refusal"] > 0.9 * NUM_STREAM_MESSAGES
    assert rounds.result() >= 2
    assert growth < MAX_GROWTH_BYTES
    assert process.num_fds() <= num_files + 10
    log = (fleet.folder / "coordinator.log").read_text()
    assert "Traceback" not in log
    assert len(log) < MIB


async def test_campaigns_that_make_no_sense(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, chaos_seed: int
) -> None:
    """A plan with any numbers is refused with a reason, or its first round begins."""
    garbage = Garbage(chaos_seed)
    async with Fleet(tmp_path) as fleet, AsyncExitStack() as stack:
        for name in HONEST:
            await fleet.enrol(name)
            await stack.enter_async_context(fleet.stream(name, pb.Hello(trains=True)))
        outcomes: Counter[str] = Counter()
        for _ in range(200):
            plan = exact_plan(cohort=len(HONEST))
            garbage.spoil(plan, num_fields=garbage.random.choice((1, 2, 4)))
            outcomes[await outcome_of(fleet, plan)] += 1
    assert {"refused", "began"} <= outcomes.keys(), outcomes
    assert not [record for record in caplog.records if record.exc_info]


async def outcome_of(fleet: Fleet, plan: pb.CampaignPlan) -> str:
    """Start a campaign, and end it if it started; tells how far it came."""
    try:
        campaign_id = await fleet.start_campaign(plan)
    except (CampaignError, PeerError):
        return "refused"
    async with asyncio.timeout(PATIENCE_S):
        async for campaign in fleet.operator.watch(campaign_id):
            if campaign.rounds or campaign.reason or campaign.state != pb.CAMPAIGN_STATE_RUNNING:
                break
    if campaign.state != pb.CAMPAIGN_STATE_RUNNING:  # for instance if no time at all is given
        assert "rounds in a row failed" in campaign.reason
        return "failed"
    await fleet.operator.cancel(campaign_id)
    await fleet.finish(campaign_id)
    return "began" if campaign.rounds else "waits"


async def test_noise_instead_of_calls(tmp_path: Path, chaos_seed: int) -> None:
    """Bytes that are neither TLS nor HTTP/2 close their connection and touch nobody else."""
    garbage = Garbage(chaos_seed)
    async with Fleet(tmp_path) as fleet:
        folder = await fleet.enrol("mallory")
        context = ssl.create_default_context(cafile=folder / "ca.pem")
        context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
        context.set_alpn_protocols(["h2"])
        for port in fleet.ports.values():
            for tls in (None, context):
                for _ in range(25):
                    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
                    writer.write(garbage.random.randbytes(garbage.random.choice((1, 40, 3000))))
                    with suppress(OSError):
                        writer.write_eof() if tls is None else writer.close()
                        await asyncio.wait_for(reader.read(), PATIENCE_S)
                    writer.close()
        assert (await fleet.operator.status()).num_devices == 1
        await fleet.enrol("press-7")
