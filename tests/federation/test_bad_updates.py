"""Updates that must not get into a sum: damaged, of another model, of another round."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from minga.federation import transfer, transport
from minga.federation.device.metrics import Metrics
from minga.federation.device.participant import Participant
from minga.federation.device.trainer_process import TrainedUpdate
from minga.federation.errors import AccessError, PeerError
from minga.federation.identity import load_identity
from minga.federation.limits import MAX_MESSAGE_BYTES
from minga.federation.trainer import Scalar, TrainingConfig
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.coordinator.desk import constant_update
from tests.federation.exact import WEIGHTS, assert_sums_exact, exact_options, exact_plan
from tests.federation.fleet import PATIENCE_S, Fleet, Stream

NAMES = list(WEIGHTS)[:4]
HONEST, BAD = NAMES[:3], NAMES[3]


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A coordinator and three honest devices."""
    async with Fleet(tmp_path) as fleet:
        for name in HONEST:
            await fleet.add(name, exact_options(name))
        yield fleet


def plan(num_rounds: int = 1) -> pb.CampaignPlan:
    """All four devices; one may be lost."""
    return exact_plan(cohort=len(NAMES), num_rounds=num_rounds)


# --- what a site's own training brings forth ---


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"step": "nan"}, "UpdateError on the device: the update holds NaN or infinity"),
        ({"step": "-inf"}, "UpdateError on the device: the update holds NaN or infinity"),
        ({"spoil": "shapes"}, "training failed on the device"),
        ({"spoil": "names"}, "training failed on the device"),
        ({"num_examples": 0}, "training failed on the device"),
    ],
    ids=["NaN", "infinity", "other shapes", "other tensors", "no examples"],
)
async def test_bad_update_stays_on_its_device(
    fleet: Fleet, options: dict[str, Scalar], reason: str
) -> None:
    """A device whose training yields no update of the model withdraws, and the round goes on."""
    await fleet.add(BAD, {**exact_options(BAD), **options})
    campaign = await fleet.finish(await fleet.start_campaign(plan()))
    await assert_sums_exact(fleet, campaign)
    (round_,) = campaign.rounds
    assert list(round_.survivors) == HONEST
    assert round_.lost[BAD].startswith(reason)


# --- what a device by hand tries ---


class Trainer:
    """Gives the constant update without a process."""

    async def fit(self, model: Path, config: TrainingConfig) -> TrainedUpdate:
        return constant_update(model, exact_options(BAD)["step"], WEIGHTS[BAD])


class Mallory:
    """Takes part in rounds by hand, and may say something else first."""

    def __init__(self, fleet: Fleet, stream: Stream, channel: grpc.aio.Channel) -> None:
        self.address = fleet.coordinator.addresses.device
        self.identity = load_identity(fleet.folder / BAD)
        self.stream = stream
        self.blobs = transfer.BlobStub(channel)
        self.masked = self.model = b""

    def join(self, invite: pb.RoundInvite) -> None:
        """Begin a round."""
        self.participant = Participant(
            invite,
            identity=self.identity,
            trainer=Trainer(),  # type: ignore[arg-type]
            download=self._download,
            upload=self._keep,
            metrics=Metrics(),
        )

    async def hear(self) -> pb.SessionResponse:
        """Wait for the coordinator's next word."""
        return await asyncio.wait_for(self.stream.read(), PATIENCE_S)

    async def follow(self, last: str) -> tuple[pb.SessionResponse, pb.SessionRequest]:
        """Answer the coordinator until it sends some kind of message; gives that and its answer."""
        while True:
            message = await self.hear()
            if message.HasField("invite"):
                self.join(message.invite)
            if message.HasField("round_end"):
                return message, pb.SessionRequest()
            answer = await self.participant.answer(message)
            if message.WhichOneof("body") == last:
                return message, answer
            await self.stream.write(answer)

    async def refusal_of(self, request: pb.SessionRequest) -> str:
        """Send something and give the reason for which it is refused."""
        await self.stream.write(request)
        return (await self.hear()).refusal.reason

    async def upload(self, data: bytes, digest: bytes) -> None:
        """Upload something as the update of this round."""
        await transfer.upload(self.blobs, data, digest, address=self.address)

    async def _keep(self, digest: bytes, data: bytes) -> None:
        self.masked = data

    async def _download(self, digest: bytes, path: Path) -> None:
        await transfer.download(self.blobs, digest, path, address=self.address)
        self.model = path.read_bytes()


@asynccontextmanager
async def mallory_of(fleet: Fleet) -> AsyncIterator[Mallory]:
    """A device by hand, connected."""
    identity = load_identity(await fleet.enrol(BAD))
    address = fleet.coordinator.addresses.device
    hello = pb.Hello(trains=True)
    async with fleet.stream(BAD, hello) as stream, transport.open_channel(address, identity) as own:
        yield Mallory(fleet, stream, own)


def announcing(update: pb.MaskedUpdate, **changes: object) -> pb.SessionRequest:
    """Announce an upload, with something changed."""
    request = pb.SessionRequest(masked_update=update)
    for name, value in changes.items():
        setattr(request.masked_update, name, value)
    return request


async def not_uploaded(mallory: Mallory, update: pb.MaskedUpdate) -> str:
    return await mallory.refusal_of(announcing(update))


async def another_digest(mallory: Mallory, update: pb.MaskedUpdate) -> str:
    return await mallory.refusal_of(announcing(update, digest=bytes(32)))


async def another_model(mallory: Mallory, update: pb.MaskedUpdate) -> str:
    """The global model itself, which is there, in the update's place."""
    digest = transfer.digest_of(mallory.model)
    return await mallory.refusal_of(announcing(update, digest=digest, size=len(mallory.model)))


async def oversize_announced(mallory: Mallory, update: pb.MaskedUpdate) -> str:
    return await mallory.refusal_of(announcing(update, size=update.size + 1))


async def oversize_uploaded(mallory: Mallory, update: pb.MaskedUpdate) -> str:
    data = mallory.masked + b"x"
    with pytest.raises(AccessError) as raised:
        await mallory.upload(data, transfer.digest_of(data))
    return str(raised.value)


async def other_content(mallory: Mallory, update: pb.MaskedUpdate) -> str:
    with pytest.raises(PeerError) as raised:
        await mallory.upload(bytes(len(mallory.masked)), update.digest)
    return str(raised.value)


async def stale_round(mallory: Mallory, update: pb.MaskedUpdate) -> str:
    return await mallory.refusal_of(announcing(update, round_id="0" * 32))


async def update_of_a_plain_round(mallory: Mallory, update: pb.MaskedUpdate) -> str:
    digest, size = transfer.digest_of(mallory.model), len(mallory.model)
    plain = pb.PlainUpdate(round_id=update.round_id, digest=digest, size=size, num_examples=1)
    return await mallory.refusal_of(pb.SessionRequest(plain_update=plain))


Lie = Callable[[Mallory, pb.MaskedUpdate], Awaitable[str]]
LIES: dict[Lie, str] = {
    not_uploaded: "is not uploaded",
    another_digest: "is not uploaded",
    another_model: "bytes",
    oversize_announced: "is not uploaded",
    oversize_uploaded: "may not upload",
    other_content: "digest",
    stale_round: "is not open",
    update_of_a_plain_round: "unmasked",
}


async def test_lies_about_an_update_are_refused(fleet: Fleet) -> None:
    """Each is refused with its reason and changes nothing: the honest update still counts, once."""
    async with mallory_of(fleet) as mallory:
        campaign_id = await fleet.start_campaign(plan())
        _, answer = await mallory.follow("neighbour_shares")
        for lie, reason in LIES.items():
            assert reason in await lie(mallory, answer.masked_update), lie.__name__
        await mallory.upload(mallory.masked, answer.masked_update.digest)
        await mallory.stream.write(answer)
        end, _ = await mallory.follow("round_end")
        assert end.round_end.counted
        campaign = await fleet.finish(campaign_id)
    await assert_sums_exact(fleet, campaign)
    assert list(campaign.rounds[0].survivors) == NAMES


async def test_answers_of_the_round_before_are_refused(fleet: Fleet) -> None:
    """What a device sent in one round is nothing in the next, under its own name or the new one."""
    async with mallory_of(fleet) as mallory:
        campaign_id = await fleet.start_campaign(plan(num_rounds=2))
        _, advert = await mallory.follow("invite")
        await mallory.stream.write(advert)
        _, update = await mallory.follow("neighbour_shares")
        await mallory.upload(mallory.masked, update.masked_update.digest)
        await mallory.stream.write(update)
        await mallory.follow("round_end")
        invite, honest = await mallory.follow("invite")
        for stale in (advert, update):
            assert "is not open" in await mallory.refusal_of(stale)
        advert.key_advert.round_id = invite.invite.round_id
        assert "signature" in await mallory.refusal_of(advert)
        await mallory.stream.write(honest)
        _, update = await mallory.follow("neighbour_shares")
        await mallory.upload(mallory.masked, update.masked_update.digest)
        await mallory.stream.write(update)
        await mallory.follow("round_end")
        campaign = await fleet.finish(campaign_id)
    await assert_sums_exact(fleet, campaign)
    assert [list(round_.survivors) for round_ in campaign.rounds] == [NAMES, NAMES]


async def test_wrong_model_digest(fleet: Fleet) -> None:
    """A device that trains another model than the round's signs that, and is refused for it."""
    async with mallory_of(fleet) as mallory:
        campaign_id = await fleet.start_campaign(plan())
        invite = await mallory.hear()
        invite.invite.model_digest = bytes(32)
        mallory.join(invite.invite)
        advert = await mallory.participant.answer(invite)
        assert "signature" in await mallory.refusal_of(advert)
        withdrawal = pb.RoundWithdrawal(round_id=invite.invite.round_id, reason="another model")
        await mallory.stream.write(pb.SessionRequest(withdrawal=withdrawal))
        campaign = await fleet.finish(campaign_id)
        await asyncio.gather(mallory.participant.close(), return_exceptions=True)
    await assert_sums_exact(fleet, campaign)
    assert dict(campaign.rounds[0].lost) == {BAD: "another model"}


async def test_message_that_is_too_large(fleet: Fleet) -> None:
    """A message over the limit ends its stream with the reason, and the device may come back."""
    async with mallory_of(fleet) as mallory:
        long = pb.RoundWithdrawal(round_id="x" * MAX_MESSAGE_BYTES)
        identity, address = mallory.identity, mallory.address
        credentials = grpc.ssl_channel_credentials(
            identity.authority_pem, identity.key_pem(), identity.certificate_pem
        )
        async with grpc.aio.secure_channel(address, credentials) as channel:
            call = pb_grpc.FederationServiceStub(channel).Session()
            await call.write(pb.SessionRequest(hello=pb.Hello()))
            assert (await call.read()).WhichOneof("body") == "welcome"
            await call.write(pb.SessionRequest(withdrawal=long))
            assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with fleet.stream(BAD, pb.Hello()):
        pass
