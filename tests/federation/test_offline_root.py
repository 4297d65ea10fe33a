"""A fleet under an offline root: at work, over a replacement, and against a thief."""

import shutil
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from minga.federation import audit, transport
from minga.federation.certificates import load_certificate
from minga.federation.coordinator import intermediate
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.authority import AUTHORITY_FOLDER, Authority
from minga.federation.coordinator.root import Root
from minga.federation.device.enrolment import enrol
from minga.federation.errors import FederationError, IdentityError
from minga.federation.identity import (
    AUTHORITY_FILE,
    KEY_FILE,
    Identity,
    Role,
    load_identity,
    load_or_create_key,
    make_csr,
    new_key,
    save_identity,
    utc_now,
)
from minga.federation.operator import connect
from minga.federation.parameters import from_bytes
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from tests.federation.fleet import Fleet, campaign_plan, toy_model


def hold_ceremony(root: Root, folder: Path, days: float = 365) -> None:
    """Give a coordinator, which does not run, a new intermediate."""
    authority = folder / "coordinator" / AUTHORITY_FOLDER
    csr = intermediate.request(authority, root.certificate, utc_now())
    intermediate.install(authority, root.sign(csr, timedelta(days=days)), utc_now())


@pytest.fixture(autouse=True)
def devices_dial_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that finds no link looks for a newer intermediate after one second, not ten."""
    monkeypatch.setattr("minga.federation.device.redial.MAX_RECONNECT_BACKOFF_S", 1.0)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    """The offline root."""
    return Root.create(tmp_path / "root", "")


@pytest.fixture
async def fleet(tmp_path: Path, root: Root) -> AsyncIterator[Fleet]:
    """A coordinator under the root, without devices."""
    hold_ceremony(root, tmp_path / "site")
    async with Fleet(tmp_path / "site") as fleet:
        yield fleet


async def steal(fleet: Fleet) -> Fleet:
    """Copy the state folder, and make what a thief can run of it, where the coordinator was."""
    await fleet.stop_coordinator()
    stolen = fleet.folder.parent / "stolen"
    shutil.copytree(fleet.folder / "coordinator", stolen / "coordinator")
    thief = Fleet(stolen)
    thief.ports = dict(fleet.ports)
    return thief


async def replace(fleet: Fleet, root: Root) -> None:
    """Start the coordinator, which is stopped, with a new intermediate."""
    hold_ceremony(root, fleet.folder)
    await fleet.start_coordinator()


def number_of(fleet: Fleet, name: str) -> int:
    """Say which intermediate a device trusts, as its folder has it."""
    known = load_identity(fleet.folder / name).intermediate
    assert known is not None
    return known.serial_number


async def come_back(fleet: Fleet, *names: str) -> None:
    """Wait until devices are connected."""
    await fleet.until(lambda devices: {d.device_id for d in devices if d.connected} >= set(names))


def mint(authority: Authority, folder: Path, name: str, role: Role = Role.DEVICE) -> Identity:
    """Make an identity folder with a stolen authority."""
    key = load_or_create_key(folder / KEY_FILE)
    identity = authority.identity_of(key, authority.issue_client(role, name, make_csr(key, name)))
    save_identity(folder, identity)
    return identity


async def says_hello(fleet: Fleet, identity: Identity) -> None:
    """Open a control stream by hand, without the checks at home."""
    async with transport.open_channel(
        fleet.operator.address, identity, any_intermediate=True
    ) as channel:
        call = pb_grpc.FederationServiceStub(channel).Session()
        with transport.calling(fleet.operator.address):
            await call.write(pb.SessionRequest(hello=pb.Hello()))
            await call.read()


async def test_rounds_go_on_over_a_replaced_intermediate(fleet: Fleet, root: Root) -> None:
    """Devices enrol and train; in the middle of a round the intermediate changes; they come back.

    Nobody enrols again, and the campaign ends with the exact sum.
    """
    names = [f"site-{index}" for index in range(4)]
    for name in names:
        await fleet.add(name, {"step": 1.0, "num_examples": 100, "delay_s": 0.5})
    await come_back(fleet, *names)
    assert {number_of(fleet, name) for name in names} == {1}
    keys = {name: load_identity(fleet.folder / name).key.public_key() for name in names}
    first = await fleet.finish(await fleet.start_campaign(campaign_plan()))
    assert first.rounds[-1].stage == pb.ROUND_STAGE_COMMITTED, first.rounds[-1].reason

    campaign_id = await fleet.start_campaign(campaign_plan(training_timeout_s=60.0))
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    await fleet.stop_coordinator()
    await replace(fleet, root)
    second = await fleet.finish(campaign_id)

    assert second.rounds[-1].stage == pb.ROUND_STAGE_COMMITTED, second.rounds[-1].reason
    assert list(second.rounds[-1].survivors) == names
    result = from_bytes(await fleet.operator.read(second.model_digest))
    for name, value in toy_model().items():
        np.testing.assert_allclose(result[name] - value, 1.0, atol=1e-6)
    assert {number_of(fleet, name) for name in names} == {2}
    for name in names:
        identity = load_identity(fleet.folder / name)
        assert identity.key.public_key() == keys[name]
        assert identity.authority == root.certificate
    # Whoever has the root's certificate, for instance a device, verifies both lives of the log.
    log = fleet.folder / "coordinator" / "coordinator.db"
    authority = load_certificate(fleet.folder / "site-0" / AUTHORITY_FILE)
    audit.verify(read_log(log), authority)
    kinds = [record.kind for record in read_log(log) if isinstance(record, audit.Entry)]
    assert kinds.count(Kind.DEVICE_ENROLLED) == len(names)
    assert kinds.count(Kind.DEVICE_RENEWED) >= len(names)


async def test_a_thief_of_the_state_folder_is_locked_out(fleet: Fleet, root: Root) -> None:
    """After the replacement: as coordinator, as operator, and as any device, invented or not."""
    await fleet.add("press-1")
    await come_back(fleet, "press-1")
    thief = await steal(fleet)
    stolen = Authority.open(thief.folder / "coordinator" / AUTHORITY_FOLDER)
    await replace(fleet, root)
    await come_back(fleet, "press-1")
    assert number_of(fleet, "press-1") == 2

    # Its devices and its operator get nowhere.
    for number, name in enumerate(("press-1", "press-2")):
        with pytest.raises(IdentityError, match="was replaced; renew"):
            await says_hello(fleet, mint(stolen, thief.folder / f"minted-{number}", name))
    async with connect(thief.folder / "coordinator") as operator:
        with pytest.raises(FederationError):
            await operator.create_token("default", 600)
    minted = mint(stolen, thief.folder / "minted-3", "press-1")
    (thief.folder / "minted-3" / "coordinator.json").write_bytes(
        (fleet.folder / "press-1" / "coordinator.json").read_bytes()
    )
    thief.start_device("minted-3")
    refused = await thief.device_ends("minted-3")
    assert isinstance(refused, IdentityError)
    assert load_identity(thief.folder / "minted-3").certificate == minted.certificate

    # Its coordinator, in the honest one's place, is not spoken to; also not after a restart.
    token = (await fleet.operator.create_token("default", 600)).token
    await fleet.stop_coordinator()
    await thief.start_coordinator()
    try:
        ended = await fleet.device_ends("press-1")
        assert isinstance(ended, IdentityError)
        fleet.start_device("press-1")
        ended = await fleet.device_ends("press-1")
        assert isinstance(ended, IdentityError)
        with pytest.raises(IdentityError, match="does not trust"):
            await enrol(token, fleet.folder / "press-3", "press-3")
        assert (await thief.operator.status()).num_connected == 0
    finally:
        await thief.stop_coordinator()
    assert number_of(fleet, "press-1") == 2


async def test_what_a_thief_can_until_a_device_has_seen_the_newer_intermediate(
    fleet: Fleet, root: Root
) -> None:
    """The limit of it: a device that was away all the time takes the thief for the coordinator.

    It is over when the device meets the honest one, or when the stolen intermediate ends.
    """
    await fleet.enrol("press-1")
    thief = await steal(fleet)
    hold_ceremony(root, fleet.folder)
    await thief.start_coordinator()
    try:
        fleet.start_device("press-1")
        await come_back(thief, "press-1")
    finally:
        await thief.stop_coordinator()
    await fleet.start_coordinator()
    await come_back(fleet, "press-1")
    assert number_of(fleet, "press-1") == 2


async def test_another_root_does_not_take_a_fleet_over(
    fleet: Fleet, root: Root, tmp_path: Path
) -> None:
    """Not with a higher number either: devices go over to their own root's intermediates alone."""
    await fleet.enrol("press-1")
    await fleet.stop_coordinator()
    other = Root.create(tmp_path / "other-root", "")
    other.sign(make_csr(new_key(), "x"))
    hold_ceremony(other, tmp_path / "other")
    stranger = Fleet(tmp_path / "other")
    stranger.ports = dict(fleet.ports)
    await stranger.start_coordinator()
    try:
        fleet.start_device("press-1")
        ended = await fleet.device_ends("press-1")
        assert isinstance(ended, IdentityError)
        assert "does not trust" in str(ended)
    finally:
        await stranger.stop_coordinator()
    assert number_of(fleet, "press-1") == 1


async def test_a_revoked_device_does_not_come_back_by_a_replacement(
    fleet: Fleet, root: Root
) -> None:
    """Revocation is by name, and outlives intermediates."""
    await fleet.enrol("press-1")
    await fleet.operator.revoke("press-1")
    await fleet.stop_coordinator()
    await replace(fleet, root)
    fleet.start_device("press-1")
    ended = await fleet.device_ends("press-1")
    assert isinstance(ended, IdentityError)
    assert "revoked" in str(ended)


async def test_the_operator_s_identity_follows(fleet: Fleet, root: Root, tmp_path: Path) -> None:
    """The one in the state folder at once; a copy, and a token, from before are refused."""
    token = (await fleet.operator.create_token("default", 600)).token
    copy = tmp_path / "copy"
    shutil.copytree(fleet.folder / "coordinator" / "operator", copy)
    await fleet.stop_coordinator()
    await replace(fleet, root)
    assert not list((await fleet.operator.status()).campaigns)
    async with connect(copy) as operator:
        with pytest.raises(IdentityError, match="does not trust"):
            await operator.status()
    with pytest.raises(IdentityError, match="does not trust"):
        await enrol(token, tmp_path / "press-1", "press-1")
