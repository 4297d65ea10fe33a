"""Devices that lie, flood, hang or clone themselves cost themselves their stream, nobody else."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from minga.federation import transfer, transport
from minga.federation.coordinator import federation_service
from minga.federation.errors import CampaignError, FederationError, PeerError, StorageError
from minga.federation.identity import Identity, load_identity
from minga.federation.limits import BLOB_GRACE_S, OUTBOX_MESSAGES
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.fleet import PATIENCE_S, Fleet, Stream, campaign_plan

TRAINS = pb.Hello(trains=True)


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A coordinator and one enrolled device."""
    async with Fleet(tmp_path) as fleet:
        await fleet.enrol("mallory")
        yield fleet


@pytest.fixture
async def quick_fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """The same, with short heartbeats: for tests in which nobody is busy when he should beat."""
    async with Fleet(tmp_path, heartbeat_interval_s=0.2) as fleet:
        await fleet.enrol("mallory")
        yield fleet


def certificate_of_version(identity: Identity, version: int) -> bytes:
    """Change the version in a certificate (RFC 5280, 4.1.2.1)."""
    der = identity.certificate.public_bytes(Encoding.DER)
    place = der.index(bytes.fromhex("a003020102")) + 4
    return der[:place] + bytes([version]) + der[place + 1 :]


def lies(round_id: str, identity: Identity) -> list[pb.SessionRequest]:
    """Messages that are too large, malformed, of nobody, or of another stage."""
    key = bytes(32)
    advert = {
        "round_id": round_id,
        "mask_key": key,
        "share_key": key,
        "self_seed_commitment": key,
        "certificate": identity.certificate_der,
        "signature": b"none",
    }
    share = pb.EncryptedShare(sender="mallory", receiver="x", ciphertext=bytes(100))
    revealed = [pb.RevealedShare(peer=f"site-{n}", share=bytes(33)) for n in range(20_000)]
    long = "x" * 10**6
    return [
        pb.SessionRequest(
            key_advert=pb.KeyAdvert(
                **{**advert, "certificate": certificate_of_version(identity, 93)},
                device_id="mallory",
            )
        ),
        pb.SessionRequest(key_advert=pb.KeyAdvert(**advert, device_id=long)),
        pb.SessionRequest(key_advert=pb.KeyAdvert(**advert, device_id="mallory\n2026 forged")),
        pb.SessionRequest(key_advert=pb.KeyAdvert(**{**advert, "mask_key": bytes(10**6)})),
        pb.SessionRequest(shares=pb.SharesUpload(round_id=round_id, shares=[share] * 20_000)),
        pb.SessionRequest(shares=pb.SharesUpload(round_id=long)),
        pb.SessionRequest(masked_update=pb.MaskedUpdate(round_id=round_id, digest=b"", size=1)),
        pb.SessionRequest(
            masked_update=pb.MaskedUpdate(round_id=round_id, digest=bytes(10**6), size=2**64 - 1)
        ),
        pb.SessionRequest(
            confirmation=pb.SurvivorConfirmation(round_id=round_id, device_id=long, signature=key)
        ),
        pb.SessionRequest(reveal=pb.ShareReveal(round_id=round_id, self_seed_shares=revealed)),
        pb.SessionRequest(
            reveal=pb.ShareReveal(
                round_id=round_id, self_seed_shares=revealed[:1], mask_key_shares=revealed[:1]
            )
        ),
        pb.SessionRequest(withdrawal=pb.RoundWithdrawal(round_id=long, reason=long)),
        pb.SessionRequest(withdrawal=pb.RoundWithdrawal(round_id="../../etc", reason="x")),
        pb.SessionRequest(model_report=pb.ModelReport(name=long, version="1", digest=key)),
        pb.SessionRequest(model_report=pb.ModelReport(name="m", version=long, digest=key)),
        pb.SessionRequest(model_report=pb.ModelReport(name="m", version="\x1b[2J", digest=key)),
        pb.SessionRequest(model_report=pb.ModelReport(name="m", version="1", digest=b"short")),
        pb.SessionRequest(model_report=pb.ModelReport()),
        pb.SessionRequest(hello=TRAINS),
        pb.SessionRequest(),
    ]


async def test_lies_are_refused_one_by_one(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Each lie gets a short refusal, the stream goes on, and the round of the others too."""
    for index in range(3):
        await fleet.add(f"site-{index}", {"step": 1.0})
    plan = campaign_plan(invite_timeout_s=2.0, stage_timeout_s=60.0)
    async with fleet.stream("mallory", TRAINS) as stream:
        campaign_id = await fleet.start_campaign(plan)
        invite = (await stream.read()).invite
        for lie in lies(invite.round_id, load_identity(fleet.folder / "mallory")):
            await stream.write(lie)
            answer = await stream.read()
            assert answer.refusal.reason, lie
            assert answer.ByteSize() < 1000
            assert answer.refusal.reason.isprintable()
        # Until then the others wait for its keys.
        leaves = pb.RoundWithdrawal(round_id=invite.round_id, reason="out of lies")
        await stream.write(pb.SessionRequest(withdrawal=leaves))
        campaign = await fleet.finish(campaign_id)
    assert list(campaign.rounds[-1].survivors) == ["site-0", "site-1", "site-2"]
    assert not [r for r in caplog.records if len(r.getMessage()) > 1000 or "\n" in r.getMessage()]


async def test_withdrawal_reason_is_cut(fleet: Fleet) -> None:
    """What a device writes into the record of a round is short and printable."""
    async with fleet.stream("mallory", TRAINS) as stream:
        for index in range(3):
            await fleet.add(f"site-{index}", {"step": 1.0})
        campaign_id = await fleet.start_campaign(campaign_plan())
        round_id = (await stream.read()).invite.round_id
        reason = "\x1b[31mroot\n" + "x" * 10**6
        await stream.write(
            pb.SessionRequest(withdrawal=pb.RoundWithdrawal(round_id=round_id, reason=reason))
        )
        campaign = await fleet.finish(campaign_id)
    (round_,) = campaign.rounds
    assert round_.lost["mallory"].startswith("?[31mroot?xxx")
    assert len(round_.lost["mallory"]) <= 500


async def test_bytes_that_are_no_message(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Garbage is refused, the stream goes on, and nothing is left behind that nobody looks at."""
    address = fleet.coordinator.addresses.device
    identity = load_identity(fleet.folder / "mallory")
    async with transport.open_channel(address, identity) as channel:
        call = channel.stream_stream(
            "/minga.federation.v1.FederationService/Session",
            request_serializer=lambda message: message,
            response_deserializer=pb.SessionResponse.FromString,
        )()
        await call.write(pb.SessionRequest(hello=TRAINS).SerializeToString())
        await call.read()
        await call.write(b"\xff\xff\xff\xff")
        assert "cannot be read" in (await call.read()).refusal.reason
        await call.write(pb.SessionRequest(heartbeat=pb.Heartbeat()).SerializeToString())
        assert (await call.read()).WhichOneof("body") == "heartbeat"
    gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.parametrize(
    "hello",
    [
        pb.Hello(model=pb.ModelReport(name="x" * 10**6, version="1", digest=bytes(32))),
        pb.Hello(model=pb.ModelReport(name="m", version="1", digest=b"short")),
    ],
    ids=["long", "short"],
)
async def test_lies_in_the_hello(fleet: Fleet, hello: pb.Hello) -> None:
    """A hello with a malformed report opens no stream."""
    async with fleet.stream("mallory") as stream:
        await stream.write(pb.SessionRequest(hello=hello))
        with pytest.raises(PeerError), transport.calling("here"):
            await stream.read()
    assert not (await fleet.operator.devices())[0].connected


async def test_hello_is_cut(fleet: Fleet) -> None:
    """Free text of a hello is cut before it is kept, and an unknown round answered briefly."""
    hello = pb.Hello(agent_version="v\n" * 10**6, round_id="r" * 10**6)
    async with fleet.stream("mallory", hello) as stream:
        assert (await stream.read()).round_end.ByteSize() < 1000
        (device,) = await fleet.operator.devices()
    assert device.agent_version == "v?" * 32


# --- streams that hang ---


async def test_stream_without_a_hello(quick_fleet: Fleet) -> None:
    """Who opens a stream and says nothing is turned away."""
    async with quick_fleet.stream("mallory") as stream:
        with pytest.raises(PeerError, match="silent"), transport.calling("here"):
            await stream.read()


async def test_silent_device_is_away(quick_fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """A device that says nothing for three heartbeats is closed; one that beats stays."""
    caplog.set_level(logging.INFO)
    await quick_fleet.add("site-0")
    async with quick_fleet.stream("mallory", TRAINS) as stream:
        assert await asyncio.wait_for(stream.read(), PATIENCE_S) is grpc.aio.EOF
    await quick_fleet.until(lambda devices: [d.connected for d in devices] == [False, True])
    assert caplog.text.count("connected to") == 1


async def test_beats_of_a_large_fleet(quick_fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The more devices there are, the less often each is told to beat, also on an open stream."""
    monkeypatch.setattr(federation_service, "HEARTBEATS_PER_S", 0.1)
    async with quick_fleet.stream("mallory", TRAINS) as stream:
        answers = []
        for _ in range(2):
            await stream.write(pb.SessionRequest(heartbeat=pb.Heartbeat()))
            answers.append(await stream.read())
    assert answers[0].welcome.heartbeat_interval_ms == 10_000
    assert answers[1].WhichOneof("body") == "heartbeat"


@pytest.mark.slow
async def test_device_that_never_reads(fleet: Fleet) -> None:
    """A device that floods and reads no answer is cut off, though its link is fine."""
    identity = load_identity(fleet.folder / "mallory")
    credentials = grpc.ssl_channel_credentials(
        identity.authority_pem, identity.key_pem(), identity.certificate_pem
    )
    # Without probing for bandwidth a stream takes in 64 KiB that nobody reads, not 4 MiB.
    options = [("grpc.http2.bdp_probe", 0)]
    address = fleet.coordinator.addresses.device
    async with grpc.aio.secure_channel(address, credentials, options) as channel:
        stream = pb_grpc.FederationServiceStub(channel).Session()
        await stream.write(pb.SessionRequest(hello=TRAINS))
        assert (await stream.read()).WhichOneof("body") == "welcome"
        flood = asyncio.create_task(write_for_ever(stream))
        await fleet.until(lambda devices: not devices[0].connected)
        flood.cancel()
        await asyncio.gather(flood, return_exceptions=True)


async def write_for_ever(stream: Stream) -> None:
    """Provoke answers, slowly enough that they are sent, until no more of them fit on the way."""
    lie = pb.SessionRequest(withdrawal=pb.RoundWithdrawal(round_id="x" * 1000))
    while True:
        await stream.write(lie)
        await asyncio.sleep(0.002)


async def test_revoked_device_that_never_reads(fleet: Fleet) -> None:
    """A device that was revoked is away at once, whatever its stream does."""
    async with fleet.stream("mallory", TRAINS):
        await fleet.operator.revoke("mallory")
        (device,) = await fleet.operator.devices()
        assert not device.connected


async def test_owners_least_company(tmp_path: Path) -> None:
    """A device that wants to hide among more updates than the plan assures takes no part."""
    async with Fleet(tmp_path) as fleet:
        for index, least in enumerate([3, 3, 3, 4, 5]):
            await fleet.add(f"site-{index}", {"step": 1.0}, min_summed=least)
        plan = campaign_plan(cohort=5, min_cohort=3, expected_dropout=0.2)
        (round_,) = (await fleet.finish(await fleet.start_campaign(plan))).rounds
        assert round_.stage == pb.ROUND_STAGE_COMMITTED, round_.reason
        assert list(round_.lost) == ["site-4"]
        assert "may sum as few as 4 updates; this site wants 5" in round_.lost["site-4"]


async def test_second_stream_takes_over(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """Of two streams of one device the newer one counts; the older one is closed, with a word."""
    async with fleet.stream("mallory", TRAINS) as old, fleet.stream("mallory", TRAINS) as new:
        assert await asyncio.wait_for(old.read(), PATIENCE_S) is grpc.aio.EOF
        await new.write(pb.SessionRequest(heartbeat=pb.Heartbeat()))
        assert (await new.read()).WhichOneof("body") == "heartbeat"
        (device,) = await fleet.operator.devices()
        assert device.connected
    assert "mallory opened a second stream" in caplog.text


# --- operators ---


async def test_revoked_device_leaves_the_round_at_once(tmp_path: Path) -> None:
    """A round goes on without a device that is revoked, however long devices may be away."""
    async with Fleet(tmp_path, reconnect_grace_s=600.0) as fleet:
        for index in range(4):
            delay_s = 600.0 if index == 3 else 0.0
            await fleet.add(f"site-{index}", {"step": 1.0, "delay_s": delay_s})
        campaign_id = await fleet.start_campaign(campaign_plan(training_timeout_s=600.0))
        await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
        await fleet.operator.revoke("site-3")
        (round_,) = (await fleet.finish(campaign_id)).rounds
        assert round_.stage == pb.ROUND_STAGE_COMMITTED
        assert dict(round_.lost) == {"site-3": "revoked by an operator"}


async def test_more_models_than_an_outbox_holds(fleet: Fleet) -> None:
    """A device that connects hears of every model, however many there are."""
    for number in range(OUTBOX_MESSAGES + 10):
        await fleet.operator.publish_model(f"model-{number}", "1", b"no model at all")
    async with fleet.stream("mallory", TRAINS) as stream:
        names = {(await stream.read()).model_offer.name for _ in range(OUTBOX_MESSAGES + 10)}
    assert len(names) == OUTBOX_MESSAGES + 10


@pytest.mark.parametrize(("name", "version"), [("../m", "1"), ("m", ""), ("m", "a/b"), ("m", "\n")])
async def test_unusable_names_are_not_published(fleet: Fleet, name: str, version: str) -> None:
    """A model that no device could keep is refused when it is published."""
    with pytest.raises(FederationError, match=r"no (model name|version)"):
        await fleet.operator.publish_model(name, version, b"model")


async def test_blobs_that_nobody_refers_to(tmp_path: Path) -> None:
    """Uploads that nothing came of are deleted after a while, what is in use is not."""
    late_s = 0.0
    async with Fleet(tmp_path, clock=lambda: time.time() + late_s) as fleet:
        await fleet.operator.publish_model("model", "1", b"in use")
        with pytest.raises(CampaignError, match="safetensors"):
            await fleet.operator.start_campaign(campaign_plan(), b"no model")
        assert fleet.coordinator.collect_blobs() == 0
        late_s = BLOB_GRACE_S + 60.0
        assert fleet.coordinator.collect_blobs() == 1
        assert await fleet.operator.read(transfer.digest_of(b"in use")) == b"in use"


async def test_one_coordinator_per_folder(fleet: Fleet) -> None:
    """A second coordinator on the same state folder is refused, whatever its ports."""
    second = Fleet(fleet.folder)
    with pytest.raises(StorageError, match="another coordinator"):
        await second.start_coordinator()
