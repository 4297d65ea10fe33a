"""Coordinator and devices over real gRPC with mutual TLS and secure aggregation."""

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import grpc
import httpx
import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from onnx import TensorProto, helper

from minga.cluster.ancestry import device_services
from minga.federation import transport
from minga.federation.coordinator.authority import Authority
from minga.federation.device.enrolment import enrol
from minga.federation.enrolment_token import EnrolmentToken
from minga.federation.errors import (
    AccessError,
    CampaignError,
    EnrolmentError,
    FederationError,
    IdentityError,
)
from minga.federation.identity import Identity, Role, load_identity, make_csr, new_key
from minga.federation.operator import connect
from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.fleet import Fleet, campaign_plan, toy_model

LEVELS = 2**15 - 1  # of 16 bits; with clip 1.0 a level is exactly 1 / LEVELS


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    """A coordinator without devices."""
    async with Fleet(tmp_path) as fleet:
        yield fleet


async def add_devices(fleet: Fleet, *steps: float, slow: Mapping[int, float] | None = None) -> None:
    """Add one device per step; its update is exactly representable, its weight 100."""
    for index, step in enumerate(steps):
        delay_s = (slow or {}).get(index, 0.0)
        options = {"step": step, "num_examples": 100, "delay_s": delay_s}
        await fleet.add(f"site-{index}", options)


async def result_of(fleet: Fleet, campaign: pb.Campaign) -> dict[str, np.ndarray]:
    """Read the last global model and take off what it started from."""
    result = from_bytes(await fleet.operator.read(campaign.model_digest))
    return {name: result[name] - value for name, value in toy_model().items()}


def mean_of_levels(*levels: int) -> np.float32:
    """The mean of updates given in levels, as the coordinator decodes it."""
    return np.float32(sum(levels) / LEVELS / len(levels))


async def test_exact_sum_of_all(fleet: Fleet) -> None:
    """Rounds end with the exact mean of every device's update, and the exact sum of weights."""
    await add_devices(fleet, 1.0, 1.0, -1.0, 1.0)
    campaign = await fleet.finish(await fleet.start_campaign(campaign_plan(num_rounds=2)))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    assert [round_.total_weight for round_ in campaign.rounds] == [400, 400]
    for values in (await result_of(fleet, campaign)).values():
        np.testing.assert_allclose(values, 2 * 0.5, atol=1e-6)


async def test_weights_count(fleet: Fleet) -> None:
    """The mean is weighted by the example counts, capped by the plan's largest weight."""
    for index, (step, num_examples) in enumerate([(1.0, 25), (0.0, 50), (0.0, 25), (0.0, 10_000)]):
        await fleet.add(f"site-{index}", {"step": step, "num_examples": num_examples})
    campaign = await fleet.finish(await fleet.start_campaign(campaign_plan()))
    assert campaign.rounds[0].total_weight == 25 + 50 + 25 + 100
    for values in (await result_of(fleet, campaign)).values():
        np.testing.assert_allclose(values, 25 / 200, atol=1 / LEVELS)


async def test_device_lost_after_sharing(fleet: Fleet) -> None:
    """A device that vanishes after it shared its keys is unmasked by the others, exactly."""
    fleet.settings["reconnect_grace_s"] = 0.2
    await fleet.stop_coordinator()
    await fleet.start_coordinator()
    await add_devices(fleet, 1.0, 1.0, 1.0, -1.0, slow={3: 600.0})
    campaign_id = await fleet.start_campaign(campaign_plan())
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    await fleet.stop_device("site-3")
    campaign = await fleet.finish(campaign_id)
    (round_,) = campaign.rounds
    assert round_.stage == pb.ROUND_STAGE_COMMITTED
    assert list(round_.sharers) == ["site-0", "site-1", "site-2", "site-3"]
    assert list(round_.survivors) == ["site-0", "site-1", "site-2"]
    assert "away" in round_.lost["site-3"]
    for values in (await result_of(fleet, campaign)).values():
        np.testing.assert_allclose(values, 1.0, atol=1e-6)


async def test_training_that_fails_withdraws(fleet: Fleet) -> None:
    """A device whose training raises leaves the round at once; its error stays on its site."""
    await add_devices(fleet, 1.0, 1.0, 1.0)
    await fleet.add("site-3", {"fail": "patient 4711 has no blood pressure"})
    campaign = await fleet.finish(await fleet.start_campaign(campaign_plan()))
    (round_,) = campaign.rounds
    assert round_.stage == pb.ROUND_STAGE_COMMITTED
    assert round_.lost["site-3"] == "training failed on the device"


async def test_too_few_survivors_abort(fleet: Fleet) -> None:
    """Rounds with too few updates abort, and after three of them the campaign fails."""
    for index in range(4):
        await fleet.add(f"site-{index}", {"fail": "disk full"} if index > 1 else {"step": 1.0})
    campaign = await fleet.finish(await fleet.start_campaign(campaign_plan()))
    assert campaign.state == pb.CAMPAIGN_STATE_FAILED
    assert len(campaign.rounds) == 3
    assert "2 of 4 devices answered" in campaign.reason


async def test_coordinator_restarts_in_a_round(fleet: Fleet) -> None:
    """It goes on with the same round, nothing doubled, and so does an operator who watches it."""
    await add_devices(fleet, 1.0, 1.0, 1.0, 1.0, slow=dict.fromkeys(range(4), 1.0))
    campaign_id = await fleet.start_campaign(campaign_plan(num_rounds=1))
    async with connect(fleet.folder / "coordinator") as operator:
        watching = asyncio.create_task(fleet.finish(campaign_id, operator))
        before = await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
        await fleet.stop_coordinator()
        await fleet.start_coordinator()
        campaign = await watching
    assert [r.round_id for r in campaign.rounds] == [before.rounds[0].round_id]
    assert list(campaign.rounds[0].survivors) == ["site-0", "site-1", "site-2", "site-3"]
    for values in (await result_of(fleet, campaign)).values():
        np.testing.assert_allclose(values, 1.0, atol=1e-6)


async def test_cancel_ends_the_round(fleet: Fleet) -> None:
    """A cancelled campaign stops at once and leaves the devices free for the next one."""
    await add_devices(fleet, 1.0, 1.0, 1.0, 1.0, slow=dict.fromkeys(range(4), 600.0))
    campaign_id = await fleet.start_campaign(campaign_plan())
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    with pytest.raises(CampaignError, match="is running"):
        await fleet.start_campaign(campaign_plan())
    await fleet.operator.cancel(campaign_id)
    campaign = await fleet.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_CANCELLED
    await fleet.start_campaign(campaign_plan())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cohort": 2}, "cohort"),
        ({"value_bits": 40}, "value_bits"),
        ({"clip": -1.0}, "clip"),
        ({"max_weight": 0}, "max_weight"),
        ({"num_rounds": 0}, "num_rounds"),
    ],
)
async def test_impossible_campaigns(
    fleet: Fleet, changes: Mapping[str, object], message: str
) -> None:
    """A plan that cannot work is refused when it is started, with the reason."""
    with pytest.raises(CampaignError, match=message):
        await fleet.start_campaign(campaign_plan(**changes))


async def test_model_must_be_safetensors(fleet: Fleet) -> None:
    """A campaign's model that is no safetensors file is refused; nothing is unpickled."""
    with pytest.raises(CampaignError, match="safetensors"):
        await fleet.operator.start_campaign(campaign_plan(), b"\x80\x04K\x01.")


# --- identity ---


async def test_revoked_device_is_cut_off(fleet: Fleet) -> None:
    """Revoking closes the open stream, and the device ends with the reason."""
    await fleet.add("site-0", {"step": 1.0})
    await until_connected(fleet, 1)
    await fleet.operator.revoke("site-0")
    assert isinstance(await fleet.device_ends("site-0"), IdentityError)
    (device,) = await fleet.operator.devices()
    assert device.revoked
    assert not device.connected


async def test_a_token_for_a_batch(fleet: Fleet, tmp_path: Path) -> None:
    """It lets in as many devices as it has uses, each by its own key, and says so in the log."""
    token = (await fleet.operator.create_token("line-3", 600, uses=2)).token
    for name in ("press-1", "press-2"):
        await enrol(token, tmp_path / name, name)
    with pytest.raises(EnrolmentError, match="used already"):
        await enrol(token, tmp_path / "press-3", "press-3")
    assert [device.group for device in await fleet.operator.devices()] == ["line-3"] * 2
    for uses in (10_001, 2**32 - 1):
        with pytest.raises(EnrolmentError, match="1 to 10000 uses"):
            await fleet.operator.create_token("line-3", 600, uses)


async def test_foreign_certificate(fleet: Fleet, tmp_path: Path) -> None:
    """A device with another authority's certificate gets nowhere."""
    folder = await fleet.enrol("site-0")
    mine = load_identity(folder)
    other = Authority.open(tmp_path / "other")
    key = new_key()
    foreign = Identity.of(
        key, other.issue_client(Role.DEVICE, "site-0", make_csr(key, "site-0")), mine.authority
    )
    with pytest.raises(IdentityError, match="not issued by this federation"):
        transport.open_channel(fleet.coordinator.addresses.device, foreign)


async def test_devices_are_no_operators(fleet: Fleet) -> None:
    """A device's certificate opens no operator's call."""
    identity = load_identity(await fleet.enrol("site-0"))
    address = fleet.coordinator.addresses.device
    async with transport.open_channel(address, identity) as channel:
        stub = pb_grpc.OperatorServiceStub(channel)
        with pytest.raises(AccessError), transport.calling(address):
            await stub.GetStatus(pb.GetStatusRequest())


# --- hostile devices ---


async def test_garbage_is_refused_and_the_round_goes_on(fleet: Fleet) -> None:
    """Messages that make no sense are refused with a reason; the stream and the round live on."""
    await add_devices(fleet, 1.0, 1.0, 1.0)
    identity = load_identity(await fleet.enrol("mallory"))
    address = fleet.coordinator.addresses.device
    async with transport.open_channel(address, identity) as channel:
        call = pb_grpc.FederationServiceStub(channel).Session()
        await call.write(pb.SessionRequest(hello=pb.Hello(trains=True)))
        assert (await call.read()).WhichOneof("body") == "welcome"
        campaign_id = await fleet.start_campaign(
            campaign_plan(stage_timeout_s=1, invite_timeout_s=1)
        )
        invite = (await call.read()).invite
        for bad in hostile_messages(invite.round_id):
            await call.write(bad)
            answer = await call.read()
            assert answer.WhichOneof("body") == "refusal", answer
            assert answer.refusal.reason
        campaign = await fleet.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    assert list(campaign.rounds[-1].survivors) == ["site-0", "site-1", "site-2"]


def hostile_messages(round_id: str) -> list[pb.SessionRequest]:
    """What a lying device may say in the first stage."""
    key = bytes(range(32))
    advert = pb.KeyAdvert(
        round_id=round_id,
        device_id="site-0",
        mask_key=key,
        share_key=key,
        self_seed_commitment=key,
        certificate=b"none",
        signature=b"none",
    )
    update = pb.MaskedUpdate(round_id=round_id, digest=key, size=1)
    confirmation = pb.SurvivorConfirmation(round_id=round_id, device_id="site-0", signature=key)
    reveal = pb.ShareReveal(
        round_id=round_id, self_seed_shares=[pb.RevealedShare(peer="site-0", share=key)]
    )
    return [
        pb.SessionRequest(key_advert=advert),
        pb.SessionRequest(key_advert=pb.KeyAdvert(round_id=round_id, mask_key=b"short")),
        pb.SessionRequest(shares=pb.SharesUpload(round_id=round_id)),
        pb.SessionRequest(masked_update=update),
        pb.SessionRequest(confirmation=confirmation),
        pb.SessionRequest(reveal=reveal),
        pb.SessionRequest(masked_update=pb.MaskedUpdate(round_id="ff" * 16, digest=key)),
        pb.SessionRequest(hello=pb.Hello()),
        pb.SessionRequest(),
    ]


async def test_session_starts_with_hello(fleet: Fleet) -> None:
    """A stream that starts with anything else is closed with the reason."""
    identity = load_identity(await fleet.enrol("site-0"))
    address = fleet.coordinator.addresses.device
    async with transport.open_channel(address, identity) as channel:
        call = pb_grpc.FederationServiceStub(channel).Session()
        await call.write(pb.SessionRequest(heartbeat=pb.Heartbeat()))
        with pytest.raises(FederationError, match="hello"), transport.calling(address):
            await call.read()


async def test_devices_upload_nothing_unasked(fleet: Fleet) -> None:
    """A device may upload only the update that its round waits for."""
    identity = load_identity(await fleet.enrol("site-0"))
    address = fleet.coordinator.addresses.device
    async with transport.open_channel(address, identity) as channel:
        call = pb_grpc.BlobServiceStub(channel).Upload()
        header = pb.UploadHeader(digest=bytes(32), size=10**9)
        await call.write(pb.UploadRequest(header=header))
        with pytest.raises(AccessError), transport.calling(address):
            await call


# --- models on devices ---


def add_one_model(path: Path) -> bytes:
    """A model that adds one to its input."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["input", "one"], ["output"])],
        "add-one",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path.read_bytes()


async def test_published_model_reaches_devices(fleet: Fleet, tmp_path: Path) -> None:
    """Connected devices fetch, test and run a published model; late ones do when they connect."""
    model = add_one_model(tmp_path / "model.onnx")
    await fleet.add("early")
    await until_connected(fleet, 1)
    assert await fleet.operator.publish_model("add-one", "3", model) == 1
    await fleet.add("late")
    await until_models(fleet, {"early": "3", "late": "3"})
    for name in ("early", "late"):
        outputs = fleet.models[name].get("add-one").run({"input": np.zeros((1, 2), np.float32)})
        np.testing.assert_array_equal(outputs["output"], [[1.0, 1.0]])


async def test_devices_versions_are_in_the_audit_log(fleet: Fleet, tmp_path: Path) -> None:
    """What a device ran and when is told by the audit log, also after the next version came."""
    model = add_one_model(tmp_path / "model.onnx")
    await fleet.add("site-0")
    for version in ("1", "2"):
        await fleet.operator.publish_model("add-one", version, model)
        await until_models(fleet, {"site-0": version})
    await fleet.stop_device("site-0")  # telling the same again when it comes back is no news
    fleet.start_device("site-0")
    await until_connected(fleet, 1)
    first, second = device_services(fleet.folder / "coordinator")
    assert (first.version, second.version) == ("1", "2")
    assert (first.place, first.model) == ("device/site-0", "add-one")
    assert first.since < first.until == second.since
    assert not second.until


async def test_bad_model_leaves_the_old_one(fleet: Fleet, tmp_path: Path) -> None:
    """A published file that is no model is reported; the version before goes on answering."""
    await fleet.add("site-0")
    await fleet.operator.publish_model("add-one", "1", add_one_model(tmp_path / "model.onnx"))
    await until_models(fleet, {"site-0": "1"})
    await fleet.operator.publish_model("add-one", "2", b"not an onnx file")
    await until_models(fleet, {"site-0": "2"}, pb.MODEL_STATE_FAILED)
    (device,) = await fleet.operator.devices()
    assert "no ONNX model" in device.model.detail
    assert fleet.models["site-0"].get("add-one").ref.version == "1"


async def until_connected(fleet: Fleet, count: int) -> None:
    """Wait until so many devices are connected."""
    async with asyncio.timeout(30):
        while (await fleet.operator.status()).num_connected < count:
            await asyncio.sleep(0.01)


async def until_models(
    fleet: Fleet, versions: Mapping[str, str], state: "pb.ModelState" = pb.MODEL_STATE_ACTIVE
) -> None:
    """Wait until devices report versions."""
    async with asyncio.timeout(30):
        while True:
            devices = await fleet.operator.devices()
            seen = {d.device_id: d.model.version for d in devices if d.model.state == state}
            if seen == dict(versions):
                return
            await asyncio.sleep(0.01)


# --- what others see ---


async def test_status_and_metrics(fleet: Fleet) -> None:
    """Status and metrics tell of devices, rounds and bytes."""
    await add_devices(fleet, 1.0, 1.0, 1.0, 1.0)
    await fleet.finish(await fleet.start_campaign(campaign_plan()))
    status = await fleet.operator.status()
    (campaign,) = status.campaigns
    assert status.num_connected == 4
    assert campaign.rounds[0].bytes_received > 4 * campaign.rounds[0].plan.num_values
    text = httpx.get(f"http://{fleet.coordinator.addresses.metrics}/metrics").text
    assert "minga_coordinator_connected_devices 4.0" in text
    assert 'minga_coordinator_rounds_total{result="committed"} 1.0' in text
    devices = {device.device_id: device for device in await fleet.operator.devices()}
    assert [device.rounds_counted for device in devices.values()] == [1, 1, 1, 1]


def written(data: bytes) -> list[bytes]:
    """Give the forms in which a program may write down some bytes."""
    code = base64.b64encode(data).rstrip(b"=")
    return [data, data.hex().encode(), code, code.replace(b"+", b"-").replace(b"/", b"_")]


async def test_nothing_secret_in_the_state(fleet: Fleet) -> None:
    """The state folder holds no token's secret, no device's key, and no single update.

    Neither while the round goes on nor after it; and what may be there, the search finds.
    """
    text = (await fleet.operator.create_token("default", 600)).token
    await enrol(text, fleet.folder / "site-9", "site-9")  # a token that was used is one still
    await add_devices(fleet, 0.125, 0.375, 0.625, 0.875)
    secret = EnrolmentToken.parse(text).secret
    keys = [load_identity(fleet.folder / f"site-{index}").key for index in (0, 1, 2, 3, 9)]
    scalars = [key.private_numbers().private_value.to_bytes(32, "big") for key in keys]
    updates = [np.full(8, step, "<f4").tobytes() for step in (0.125, 0.375, 0.625, 0.875)]
    forbidden = [form for one in (secret, *scalars, *updates) for form in written(one)]

    def found(patterns: list[bytes], folder: str = "coordinator") -> list[bytes]:
        files = [path for path in (fleet.folder / folder).rglob("*") if path.is_file()]
        content = b"\n".join(path.read_bytes() for path in files)
        content += b"".join(content.split())  # PEM and the like break lines
        return [pattern for pattern in patterns if pattern in content]

    campaign_id = await fleet.start_campaign(campaign_plan())
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    assert not found(forbidden)
    campaign = await fleet.finish(campaign_id)
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    assert not found([text.encode(), *forbidden])

    assert found([hashlib.sha256(secret).digest()])
    result = from_bytes(await fleet.operator.read(campaign.model_digest))["w"]
    assert found([result.reshape(-1)[:8].astype("<f4").tobytes()])
    own = keys[0].private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
    assert found(written(own), "site-0")


async def test_port_in_use(fleet: Fleet, tmp_path: Path) -> None:
    """A second coordinator on the same port ends with the port's number."""
    second = Fleet(tmp_path / "second", **fleet.ports)
    with pytest.raises(FederationError, match=f"port {fleet.ports['port']}"):
        await second.start_coordinator()


def test_grpc_is_not_plain(tmp_path: Path) -> None:
    """The device port answers nothing without TLS."""

    async def probe() -> None:
        async with Fleet(tmp_path) as fleet:
            address = fleet.coordinator.addresses.device
            async with grpc.aio.insecure_channel(address) as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await pb_grpc.OperatorServiceStub(channel).GetStatus(
                        pb.GetStatusRequest(), timeout=5
                    )

    asyncio.run(probe())
