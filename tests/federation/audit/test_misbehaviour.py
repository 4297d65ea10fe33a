"""Who replays, swaps, truncates or equivocates is refused, and the audit log says who and how."""

import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minga.federation import transport, wire
from minga.federation.audit import Entry
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.errors import AccessError, PeerError
from minga.federation.identity import CertificateVerifier, load_identity
from minga.federation.parameters import from_bytes
from minga.federation.secagg import agreement, signing
from minga.federation.secagg.device import DeviceSession
from minga.federation.secagg.messages import Reveal
from minga.federation.secagg.plan import RoundPlan
from minga.federation.transfer import digest_of
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.fleet import Fleet, Stream, campaign_plan, toy_model

NUM_VALUES = sum(tensor.size for tensor in toy_model().values())
WEIGHT = 10


class Mallory:
    """An enrolled device that knows the protocol and speaks for itself."""

    def __init__(self, fleet: Fleet, stream: Stream, invite: pb.RoundInvite) -> None:
        self.identity = load_identity(fleet.folder / "mallory")
        plan = wire.plan_of_invite(invite)
        assert isinstance(plan, RoundPlan)
        self.plan = plan
        verifier = CertificateVerifier(authority=self.identity.authority)
        self.session = DeviceSession(plan, self.identity, verifier)
        self.address = fleet.operator.address
        self.round_id = invite.round_id
        self._stream = stream

    async def lie(self, **body: object) -> str:
        """Send what must be refused; gives the refusal's reason."""
        await self._stream.write(pb.SessionRequest(**body))  # type: ignore[arg-type]
        answer = await self._stream.read()
        assert answer.WhichOneof("body") == "refusal", answer
        return str(answer.refusal.reason)

    async def say(self, **body: object) -> pb.SessionResponse:
        """Send what is right; gives what comes next."""
        await self._stream.write(pb.SessionRequest(**body))  # type: ignore[arg-type]
        return await self._stream.read()

    async def upload(self, announced: bytes, sent: bytes, offset: int = 0) -> None:
        """Upload a blob that may be another one than was announced, or not all of it."""

        def parts() -> Iterator[pb.UploadRequest]:
            digest = digest_of(announced)
            header = pb.UploadHeader(digest=digest, size=len(announced), offset=offset)
            yield pb.UploadRequest(header=header)
            yield pb.UploadRequest(chunk=sent)

        async with transport.open_channel(self.address, self.identity) as channel:
            with transport.calling(self.address):
                await pb_grpc.BlobServiceStub(channel).Upload(parts())

    def advert(self, plan: RoundPlan, share_key: bytes | None = None) -> pb.KeyAdvert:
        """Sign fresh keys for a plan, under this round's name."""
        keys = [agreement.generate(secrets.token_bytes).public for _ in range(2)]
        advert = signing.sign_advert(
            plan, self.identity, keys[0], share_key or keys[1], secrets.token_bytes(32)
        )
        return wire.advert_to_wire(self.round_id, advert)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """Three honest devices, and one enrolled for mallory."""
    async with Fleet(tmp_path) as fleet:
        await fleet.enrol("mallory")
        for index in range(3):
            await fleet.add(f"site-{index}", {"step": 0.5, "num_examples": WEIGHT})
        yield fleet


@asynccontextmanager
async def mallory_in_a_round(fleet: Fleet, **changes: object) -> AsyncIterator[tuple[Mallory, str]]:
    """Let mallory be invited with the others; gives it and the campaign."""
    async with fleet.stream("mallory", pb.Hello(trains=True)) as stream:
        campaign_id = await fleet.start_campaign(campaign_plan(**changes))
        yield Mallory(fleet, stream, (await stream.read()).invite), campaign_id


def entries(fleet: Fleet, kind: Kind) -> list[Entry]:
    """Read the entries of one kind."""
    records = read_log(fleet.folder / "coordinator" / "coordinator.db")
    return [one for one in records if isinstance(one, Entry) and one.kind == kind]


def flipped(shares: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
    """Make false shares of the right form."""
    return {peer: share[:-1] + bytes([share[-1] ^ 1]) for peer, share in shares}


async def lie_about_keys(mallory: Mallory) -> tuple[list[str], pb.SessionResponse]:
    """Replay keys of yesterday, then advertise two sets of keys."""
    yesterday = replace(mallory.plan, round_id=b"yesterday's one.")
    told = [await mallory.lie(key_advert=mallory.advert(yesterday))]
    own = wire.advert_to_wire(mallory.round_id, mallory.session.advertise())
    keys = await mallory.say(key_advert=own)
    told.append(await mallory.lie(key_advert=mallory.advert(mallory.plan)))
    return told, keys


async def lie_about_shares(
    mallory: Mallory, keys: pb.SessionResponse
) -> tuple[list[str], pb.SessionResponse]:
    """Leave one neighbour's share out."""
    adverts = [wire.advert_from_wire(advert) for advert in keys.neighbour_keys.adverts]
    shares = mallory.session.share(adverts)
    told = [await mallory.lie(shares=wire.shares_to_wire(mallory.round_id, shares[1:]))]
    whole = wire.shares_to_wire(mallory.round_id, shares)
    return told, await mallory.say(shares=whole)


async def lie_about_the_update(
    mallory: Mallory, inbox: pb.SessionResponse
) -> tuple[list[str], pb.SessionResponse]:
    """Upload another content, less than all, and too little; then the update."""
    shares = [wire.share_from_wire(share) for share in inbox.neighbour_shares.shares]
    delta = np.full(NUM_VALUES, 0.5, np.float32)
    masked = mallory.session.mask(shares, delta, WEIGHT)
    told = []
    with pytest.raises(AccessError):
        await mallory.upload(masked[:-1], masked[:-1])
    for sent in (masked[::-1], masked[:-1]):
        with pytest.raises(PeerError) as caught:
            await mallory.upload(masked, sent)
        told.append(str(caught.value))
    with pytest.raises(AccessError):  # one update a round: the first digest holds
        await mallory.upload(masked[::-1], masked[::-1])
    await mallory.upload(masked, masked[-1:], offset=len(masked) - 1)
    update = {"round_id": mallory.round_id, "digest": digest_of(masked)}
    told.append(await mallory.lie(masked_update=pb.MaskedUpdate(**update, size=len(masked) - 1)))
    return told, await mallory.say(masked_update=pb.MaskedUpdate(**update, size=len(masked)))


async def lie_about_survivors(
    mallory: Mallory, listed: pb.SessionResponse
) -> tuple[list[str], pb.SessionResponse]:
    """Sign another list."""
    names = list(listed.survivors.device_ids)
    other = signing.sign_survivors(mallory.plan, mallory.identity, names[1:])
    told = [await mallory.lie(confirmation=wire.confirmation_to_wire(mallory.round_id, other))]
    own = mallory.session.confirm(names)
    return told, await mallory.say(confirmation=wire.confirmation_to_wire(mallory.round_id, own))


async def lie_about_secrets(
    mallory: Mallory, signed: pb.SessionResponse
) -> tuple[list[str], pb.SessionResponse]:
    """Reveal both secrets of everybody, then shares of the right form that are false."""
    confirmations = [wire.confirmation_from_wire(c) for c in signed.confirmations.confirmations]
    honest = mallory.session.reveal(confirmations)
    both = wire.reveal_to_wire(mallory.round_id, honest)
    both.mask_key_shares.extend(both.self_seed_shares)
    told = [await mallory.lie(reveal=both)]
    false = Reveal(
        device_id="mallory",
        self_seed_shares=flipped(honest.self_seed_shares.items()),
        mask_key_shares={},
    )
    return told, await mallory.say(reveal=wire.reveal_to_wire(mallory.round_id, false))


async def test_every_lie_of_a_device_is_refused_and_named(fleet: Fleet) -> None:
    """In each stage: the lie gets its reason, the log its author, and the round the exact mean."""
    async with mallory_in_a_round(fleet) as (mallory, campaign_id):
        told, answer = await lie_about_keys(mallory)
        for lie in (lie_about_shares, lie_about_the_update, lie_about_survivors, lie_about_secrets):
            more, answer = await lie(mallory, answer)
            told += more
        assert answer.round_end.counted
        late = pb.MaskedUpdate(round_id=mallory.round_id, digest=bytes(32), size=1)
        told.append(await mallory.lie(masked_update=late))
        campaign = await fleet.finish(campaign_id)

    for reason, words in zip(
        told,
        (
            "not signed by it for this round",
            "answered stage KEYS twice, differently",
            "did not share with exactly its neighbours",
            "announced was",
            "bytes; send the rest",
            "the update that was announced is not uploaded",
            "confirmation of the survivors of mallory is not signed by it",
            "mallory revealed both secrets of",
            "is not open",
        ),
        strict=True,
    ):
        assert words in reason
    refused = entries(fleet, Kind.MESSAGE_REFUSED)
    assert [entry.details["reason"] for entry in refused] == told
    assert {entry.subject for entry in refused} == {"device/mallory"}
    assert all(
        entry.details.get("round") == mallory.round_id or "blob" in entry.details
        for entry in refused
    )
    barred = entries(fleet, Kind.ACCESS_REFUSED)
    assert [entry.subject for entry in barred] == ["device/mallory"] * 2
    assert all("BlobService/Upload" in str(entry.details["method"]) for entry in barred)
    (false,) = entries(fleet, Kind.FALSE_SHARES)
    assert (false.subject, false.details) == ("device/mallory", {"round": mallory.round_id})
    assert len(campaign.rounds[0].survivors) == 4
    model = from_bytes(await fleet.operator.read(campaign.model_digest))
    for name, value in toy_model().items():
        np.testing.assert_allclose(model[name] - value, 0.5, atol=1e-3)


async def test_what_devices_refuse_is_told(fleet: Fleet) -> None:
    """A neighbour's signed but poisoned key makes devices leave; the log says who, and why."""
    plan = {"invite_timeout_s": 1.0, "stage_timeout_s": 5.0}
    async with mallory_in_a_round(fleet, **plan) as (mallory, campaign_id):
        small_order = bytes(32)
        answer = await mallory.say(key_advert=mallory.advert(mallory.plan, share_key=small_order))
        assert answer.WhichOneof("body") == "neighbour_keys"
        await fleet.finish(campaign_id)
    withdrew = entries(fleet, Kind.DEVICE_WITHDREW)
    assert {entry.subject for entry in withdrew} == {f"device/site-{n}" for n in range(3)}
    for entry in withdrew:
        assert entry.details["round"] == mallory.round_id
        assert "mallory advertised a key of small order" in str(entry.details["reason"])
