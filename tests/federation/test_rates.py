"""Who sends too much is told so, and everybody else goes on."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.calls import RunningCalls
from minga.federation.coordinator.enrolment_service import address_of
from minga.federation.coordinator.rate import Buckets
from minga.federation.device.enrolment import enrol
from minga.federation.enrolment_token import EnrolmentToken
from minga.federation.errors import EnrolmentError, FederationError, LimitError
from minga.federation.identity import Identity, Principal, Role, load_identity, make_csr, new_key
from minga.federation.limits import MAX_CALLS, MAX_RATED, MAX_STREAMS, RATE_BURST_S
from minga.federation.transfer import Retry
from minga.federation.transport import calling, open_channel, open_pinned_channel
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.blobs.depot import Depot
from tests.federation.fleet import PATIENCE_S, Fleet, Stream, campaign_plan

HEARTBEAT = pb.SessionRequest(heartbeat=pb.Heartbeat())
OFFSET = pb.GetUploadOffsetRequest(digest=bytes(32))


# -- buckets ----------------------------------------------------------------------------------


@dataclass
class Watch:
    """A clock that is set by hand."""

    now: float = 0.0

    def __call__(self) -> float:
        """Give the time."""
        return self.now


def test_a_bucket_holds_a_burst_and_fills_again() -> None:
    """So much at once, then what time brings, and never more than a burst after any rest."""
    watch = Watch()
    buckets = Buckets[str](per_s=2.0, burst_s=5.0, clock=watch)
    assert [buckets.allows("mallory") for _ in range(12)] == [True] * 10 + [False] * 2
    assert buckets.allows("press-7", 10.0)
    watch.now = 1.0
    assert [buckets.allows("mallory") for _ in range(3)] == [True, True, False]
    assert not buckets.allows("press-7", 2.5)  # and nothing was taken
    assert buckets.allows("press-7", 2.0)
    watch.now = 1e6
    assert [buckets.allows("mallory") for _ in range(12)] == [True] * 10 + [False] * 2


def test_buckets_remember_so_many() -> None:
    """Addresses that come once do not fill the memory; who is busy is not forgotten."""
    buckets = Buckets[int](per_s=1.0, burst_s=1.0, clock=Watch())
    for number in range(2 * MAX_RATED):
        buckets.allows(number)
        assert buckets.allows(-1) is (number == 0)
    assert len(buckets._full_at) == MAX_RATED


# -- enrolment --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.7:4711", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:aa::7%5D:4711", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2:bb::8]:9", "2001:db8:1:2::/64"),
        ("ipv6:%5Bfe80::1%25eth0%5D:9", "fe80::/64"),
        ("unix:", "unix:"),
    ],
)
def test_an_address_has_no_port(peer: str, address: str) -> None:
    """Another port is no other caller, nor is another address of the same network."""
    assert address_of(peer) == address


async def test_a_flood_of_enrolments(tmp_path: Path) -> None:
    """A stranger is told to wait, in the log a few times, and a patient device gets in."""
    async with Fleet(tmp_path, enrolments_per_s=5.0) as fleet:
        text = (await fleet.operator.create_token("default", 600)).token
        token = EnrolmentToken.parse(text)
        guess = pb.EnrollRequest(
            token_secret=os.urandom(32),
            device_name="mallory",
            certificate_signing_request=make_csr(new_key(), "mallory"),
        )
        async with open_pinned_channel(token.enrol_address, token.issuer) as channel:
            stub = pb_grpc.EnrollmentServiceStub(channel)

            async def ask() -> type[FederationError]:
                with pytest.raises(FederationError) as caught, calling("coordinator"):
                    await stub.Enroll(guess)
                return caught.type

            async def ask_on() -> None:
                while not is_over.is_set():
                    kinds.extend(await asyncio.gather(*(ask() for _ in range(MAX_STREAMS - 2))))

            kinds: list[type[FederationError]] = []
            is_over = asyncio.Event()
            flooding = asyncio.create_task(ask_on())
            async with asyncio.timeout(PATIENCE_S):
                while kinds.count(LimitError) < MAX_STREAMS:
                    await asyncio.sleep(0.01)
            with pytest.raises(LimitError, match="try again in a few seconds"):
                await enrol(text, tmp_path / "hasty", "hasty", retry=Retry(attempts=1))
            is_over.set()
            await flooding
        assert set(kinds) == {EnrolmentError, LimitError}
        assert kinds.count(EnrolmentError) >= 5 * RATE_BURST_S
        patient = Retry(attempts=20, first_delay_s=0.05, max_delay_s=0.2)
        await enrol(text, tmp_path / "press-7", "press-7", retry=patient)
        log = list(read_log(tmp_path / "coordinator" / "coordinator.db"))
        refused = [r for r in log if getattr(r, "kind", "") == Kind.ENROLMENT_REFUSED]
        assert len(refused) == 10


# -- control streams --------------------------------------------------------------------------


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Three devices at work, and one that is not, of which little is borne."""
    async with Fleet(tmp_path, messages_per_s=10.0, calls_per_s=1.0) as fleet:
        for index in range(3):
            await fleet.add(f"site-{index}", {"step": 1.0})
        await fleet.enrol("mallory")
        yield fleet


async def beat_until_refused(stream: Stream) -> int:
    """Send heartbeats and read the answers until the stream ends; gives how many were answered."""
    num_answered = 0
    try:
        with calling("coordinator"):
            for num_answered in range(1000):  # noqa: B007 - it is what is told
                await stream.write(HEARTBEAT)
                assert (await stream.read()).WhichOneof("body") == "heartbeat"
    except LimitError as error:
        assert "more than 10 messages a second" in str(error)  # noqa: PT017 - it tells the number
        return num_answered
    raise AssertionError("the stream did not end")


async def beat_blindly(stream: Stream) -> None:
    """Send as fast as it goes and read nothing; whoever writes hears no reason when it ends."""

    async def write() -> None:
        while True:
            await stream.write(HEARTBEAT)

    with pytest.raises((FederationError, asyncio.InvalidStateError)), calling("coordinator"):
        await asyncio.wait_for(write(), PATIENCE_S)


async def test_a_flood_on_a_control_stream(fleet: Fleet) -> None:
    """It ends with the reason, as does the next one, sooner; the others' round commits."""
    campaign_id = await fleet.start_campaign(campaign_plan(cohort=3, expected_dropout=0.0))
    async with fleet.stream("mallory", pb.Hello()) as stream:
        burst = await beat_until_refused(stream)
    async with fleet.stream("mallory", pb.Hello()) as stream:
        rest = await beat_until_refused(stream)
    for _ in range(3):
        async with fleet.stream("mallory", pb.Hello()) as stream:
            await beat_blindly(stream)
    assert rest < burst / 2
    assert burst >= 10 * RATE_BURST_S - 2  # the hello and the last one are none of them
    (round_,) = (await fleet.finish(campaign_id)).rounds
    assert round_.stage == pb.ROUND_STAGE_COMMITTED, round_.reason
    assert len(round_.survivors) == 3
    log = read_log(fleet.folder / "coordinator" / "coordinator.db")
    refused = [r for r in log if getattr(r, "kind", "") == Kind.MESSAGE_REFUSED]
    assert {r.subject for r in refused} == {"device/mallory"}


async def test_a_flood_of_calls(fleet: Fleet) -> None:
    """Streams that are opened again and again count among them; other devices have their own."""
    address = fleet.operator.address
    refused = 0
    async with open_channel(address, load_identity(fleet.folder / "mallory")) as channel:
        for _ in range(100):
            try:
                with calling(address):
                    await pb_grpc.BlobServiceStub(channel).GetUploadOffset(OFFSET)
            except LimitError as error:
                assert "more calls than 1 a second" in str(error)  # noqa: PT017 - one of many
                refused += 1
        assert 10 < refused <= 90
        with pytest.raises(LimitError), calling(address):
            await open_and_leave(channel, 50)
    assert (await fleet.operator.status()).num_connected == 3


async def open_and_leave(channel: grpc.aio.Channel, count: int) -> None:
    """Open control streams, one after the other."""
    for _ in range(count):
        stream = pb_grpc.FederationServiceStub(channel).Session()
        await stream.write(pb.SessionRequest(hello=pb.Hello()))
        await stream.read()
        stream.cancel()


# -- calls at once, and connections -----------------------------------------------------------


async def test_calls_at_once_over_all_connections(
    serve: Callable[..., Awaitable[str]], issue: Callable[..., Identity], tmp_path: Path
) -> None:
    """Each connection has its bound; more connections do not lift the device's own."""
    address = await serve(Depot(tmp_path / "blobs").add_services)
    identity = issue("press-7")
    async with AsyncExitStack() as stack:
        uploads = []
        for _ in range(MAX_CALLS // MAX_STREAMS):
            channel = await stack.enter_async_context(open_channel(address, identity))
            uploads += [pb_grpc.BlobServiceStub(channel).Upload() for _ in range(MAX_STREAMS)]
        for number, upload in enumerate(uploads):
            header = pb.UploadHeader(digest=number.to_bytes(32, "big"), size=1)
            await upload.write(pb.UploadRequest(header=header))
            await upload.initial_metadata()
        extra = await stack.enter_async_context(open_channel(address, identity))
        with pytest.raises(LimitError, match=f"{MAX_CALLS} calls at once"), calling(address):
            await pb_grpc.BlobServiceStub(extra).GetUploadOffset(OFFSET)
        uploads[0].cancel()
        await until_allowed(pb_grpc.BlobServiceStub(extra))


async def until_allowed(stub: "pb_grpc.BlobServiceAsyncStub") -> None:
    """Call until one of the calls from before is forgotten."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                with calling("coordinator"):
                    await stub.GetUploadOffset(OFFSET)
            except LimitError:
                await asyncio.sleep(0.01)
            else:
                return


def test_a_fleet_behind_one_address_may_come_at_once() -> None:
    """Calls are counted by device: ten thousand that share an address do not share a bucket."""
    calls = RunningCalls()
    for number in range(10_000):
        device = Principal(role=Role.DEVICE, name=f"site-{number}", serial=number, key_digest=b"")
        for _ in range(10):
            calls.require_allowed(device)


async def test_connections_beyond_the_bound_are_closed(tmp_path: Path) -> None:
    """Who holds all of them keeps others out, not the ones that are in; freed ones are free."""
    async with Fleet(tmp_path, max_connections=4) as fleet:
        port = fleet.ports["port"]
        await fleet.operator.status()  # has one of the four
        open_ = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            assert not await asyncio.wait_for(reader.read(1), PATIENCE_S)
            writer.close()
        assert (await fleet.operator.status()).num_connected == 0
        for _, writer in open_:
            writer.close()
        await fleet.enrol("site-0")
        async with fleet.stream("site-0", pb.Hello()):
            assert (await fleet.operator.status()).num_connected == 1
