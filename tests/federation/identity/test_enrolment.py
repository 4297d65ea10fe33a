"""Enrolment end to end, over real TLS: the device's side against the coordinator's."""

import logging
import sqlite3
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.enrolment import Enroller
from minga.federation.coordinator.enrolment_service import EnrolmentServicer
from minga.federation.coordinator.token_table import TokenTable
from minga.federation.coordinator.tokens import TokenIssuer
from minga.federation.device.enrolment import CoordinatorAddress, enrol
from minga.federation.enrolment_token import EnrolmentToken
from minga.federation.errors import (
    EnrolmentError,
    FederationError,
    IdentityError,
    UnreachableError,
)
from minga.federation.identity import (
    CERTIFICATE_FILE,
    KEY_FILE,
    Clock,
    holds_identity,
    load_identity,
    load_or_create_key,
    make_csr,
    new_key,
    utc_now,
    verify_certificate,
)
from minga.federation.v1 import federation_pb2_grpc as pb_grpc

Serve = Callable[..., Awaitable[str]]


class Devices:
    """A register as the coordinator keeps it; can be told to crash before or after its write."""

    def __init__(self) -> None:
        self.groups: dict[str, str] = {}
        self.keys: dict[str, bytes] = {}
        self.crashes: list[str] = []

    def __call__(self, device_id: str, group: str, key_digest: bytes) -> None:
        """Register a device."""
        if "before" in self.crashes:
            self.crashes.remove("before")
            raise SystemError("crash before the write")
        if self.keys.get(device_id, key_digest) != key_digest:
            raise EnrolmentError(f"device name {device_id!r} is taken; choose another")
        if any(key == key_digest and name != device_id for name, key in self.keys.items()):
            raise EnrolmentError("this key is enrolled under another name")
        self.groups[device_id], self.keys[device_id] = group, key_digest
        if "after" in self.crashes:
            self.crashes.remove("after")
            raise SystemError("crash after the write")


class Office:
    """An enrolment port with everything behind it."""

    def __init__(self, authority: Authority, folder: Path) -> None:
        self.authority = authority
        self.table = TokenTable(sqlite3.connect(folder / "tokens.db"))
        self.devices = Devices()
        self.address = "127.0.0.1:1"

    def tokens(self, clock: Clock = utc_now) -> TokenIssuer:
        """Issue tokens that point here."""
        return TokenIssuer(
            store=self.table,
            enrol_address=self.address,
            device_address="127.0.0.1:7002",
            authority_der=self.authority.pinned_der,
            clock=clock,
        )

    def token(self, uses: int = 1) -> str:
        """Make a token of an hour."""
        return self.tokens().mint("plant-a", timedelta(hours=1), uses)

    def add_services(self, server: grpc.aio.Server, clock: Clock = utc_now) -> None:
        """Serve enrolment."""
        enroller = Enroller(
            authority=self.authority, tokens=self.tokens(clock), register_device=self.devices
        )
        pb_grpc.add_EnrollmentServiceServicer_to_server(EnrolmentServicer(enroller), server)


@pytest.fixture
async def office(authority: Authority, tmp_path: Path, serve: Serve) -> Office:
    """An open enrolment port."""
    office = Office(authority, tmp_path)
    office.address = await serve(office.add_services, mutual=False)
    return office


async def test_a_token_buys_an_identity(office: Office, tmp_path: Path) -> None:
    """The folder is complete, the certificate holds, the group is the token's."""
    identity = await enrol(office.token(), tmp_path / "device", "press-7")
    assert load_identity(tmp_path / "device").certificate == identity.certificate
    now = utc_now()
    principal = verify_certificate(identity.certificate_der, office.authority.certificate, now)
    assert str(principal) == "device 'press-7'"
    assert office.devices.groups == {"press-7": "plant-a"}
    address = CoordinatorAddress.load(tmp_path / "device")
    assert address.device_address == "127.0.0.1:7002"
    assert address.enrol_address == office.address


async def test_a_used_token_is_refused(office: Office, tmp_path: Path) -> None:
    """To another machine; and nothing but its key is left there."""
    token = office.token()
    await enrol(token, tmp_path / "one", "press-7")
    with pytest.raises(EnrolmentError, match="used already; ask the operator for a new one"):
        await enrol(token, tmp_path / "two", "press-8")
    assert [path.name for path in (tmp_path / "two").iterdir()] == [KEY_FILE]
    assert "press-8" not in office.devices.groups


async def test_a_wrong_token_is_refused(office: Office, tmp_path: Path) -> None:
    """One that this coordinator never made, though everything else in it is right."""
    office.token()
    wrong = EnrolmentToken(
        enrol_address=office.address,
        device_address=office.address,
        secret=b"w" * 32,
        authority_der=office.authority.pinned_der,
    )
    with pytest.raises(EnrolmentError, match="knows no such"):
        await enrol(wrong.to_text(), tmp_path / "device", "press-7")


async def test_an_expired_token_is_refused(
    authority: Authority, tmp_path: Path, serve: Serve
) -> None:
    """By the coordinator's clock."""
    office = Office(authority, tmp_path)

    def two_hours_on(server: grpc.aio.Server) -> None:
        office.add_services(server, clock=lambda: utc_now() + timedelta(hours=2))

    office.address = await serve(two_hours_on, mutual=False)
    with pytest.raises(EnrolmentError, match="has expired; ask the operator"):
        await enrol(office.token(), tmp_path / "device", "press-7")


async def test_a_garbled_token_or_name_dials_nobody(office: Office, tmp_path: Path) -> None:
    """And leaves no folder behind."""
    token = office.token()
    with pytest.raises(EnrolmentError, match=r"truncated or garbled|changed on its way"):
        await enrol(token[:-20], tmp_path / "device", "press-7")
    for name in ("", "Press", "../press", "press 7", "a" * 64):
        with pytest.raises(EnrolmentError, match="is not possible; use a-z"):
            await enrol(token, tmp_path / "device", name)
    assert not (tmp_path / "device").exists()


async def test_an_enrolled_folder_is_not_enrolled_again(office: Office, tmp_path: Path) -> None:
    """Its identity stays, and the token too."""
    identity = await enrol(office.token(), tmp_path / "device", "press-7")
    token = office.token()
    with pytest.raises(EnrolmentError, match="holds an identity already"):
        await enrol(token, tmp_path / "device", "press-8")
    assert load_identity(tmp_path / "device").certificate == identity.certificate
    await enrol(token, tmp_path / "other", "press-8")


async def test_a_lost_answer_is_asked_for_again(office: Office, tmp_path: Path) -> None:
    """The device crashed before it stored its certificate: same token, same key, same device."""
    token = office.token()
    first = await enrol(token, tmp_path / "device", "press-7")
    (tmp_path / "device" / CERTIFICATE_FILE).unlink()
    again = await enrol(token, tmp_path / "device", "press-7")
    assert again.certificate.public_key() == first.certificate.public_key()
    assert holds_identity(tmp_path / "device")
    assert list(office.devices.groups) == ["press-7"]


@pytest.mark.parametrize("moment", ["before", "after"])
async def test_a_coordinator_that_crashes_leaves_the_token_usable(
    office: Office, tmp_path: Path, moment: str
) -> None:
    """Between redeeming and registering, and between registering and answering."""
    token = office.token()
    office.devices.crashes.append(moment)
    with pytest.raises(FederationError, match="coordinator failed"):
        await enrol(token, tmp_path / "device", "press-7")
    await enrol(token, tmp_path / "device", "press-7")
    assert office.devices.groups == {"press-7": "plant-a"}


async def test_a_taken_name_does_not_cost_the_token(office: Office, tmp_path: Path) -> None:
    """The same machine tries again under another name."""
    await enrol(office.token(), tmp_path / "one", "press-7")
    token = office.token()
    with pytest.raises(EnrolmentError, match="'press-7' is taken"):
        await enrol(token, tmp_path / "two", "press-7")
    await enrol(token, tmp_path / "two", "press-8")
    assert sorted(office.devices.groups) == ["press-7", "press-8"]


async def test_one_use_is_one_device(office: Office, tmp_path: Path) -> None:
    """A machine that keeps its key gets no second name out of one use."""
    token = office.token()
    await enrol(token, tmp_path / "device", "press-7")
    (tmp_path / "device" / CERTIFICATE_FILE).unlink()
    with pytest.raises(EnrolmentError, match="under another name"):
        await enrol(token, tmp_path / "device", "press-8")


async def test_whoever_answers_must_be_the_token_s_coordinator(
    foreign_authority: Authority, authority: Authority, tmp_path: Path, serve: Serve
) -> None:
    """The token pins the authority: its secret is not even sent to another one."""
    impostor = Office(foreign_authority, tmp_path)
    impostor.address = await serve(impostor.add_services, mutual=False, issuer=foreign_authority)
    token = EnrolmentToken(
        enrol_address=impostor.address,
        device_address=impostor.address,
        secret=EnrolmentToken.parse(impostor.token()).secret,
        authority_der=authority.pinned_der,
    )
    with pytest.raises(IdentityError, match="does not trust"):
        await enrol(token.to_text(), tmp_path / "device", "press-7")
    assert not impostor.devices.groups


async def test_nobody_there_leaves_the_token_usable(office: Office, tmp_path: Path) -> None:
    """Once the coordinator is up, the same folder enrols."""
    address = office.address
    office.address = "127.0.0.1:1"
    text = office.token()
    with pytest.raises(UnreachableError, match=r"no coordinator answers at 127\.0\.0\.1:1 "):
        await enrol(text, tmp_path / "device", "press-7")
    token = EnrolmentToken.parse(text)
    moved = EnrolmentToken(
        enrol_address=address,
        device_address=token.device_address,
        secret=token.secret,
        authority_der=token.authority_der,
    )
    key = load_or_create_key(tmp_path / "device" / KEY_FILE)
    identity = await enrol(moved.to_text(), tmp_path / "device", "press-7")
    assert identity.certificate.public_key() == key.public_key()


def test_a_bad_request_does_not_cost_the_token(authority: Authority, tmp_path: Path) -> None:
    """Name and request are checked before the token is touched."""
    office = Office(authority, tmp_path)
    enroller = Enroller(authority=authority, tokens=office.tokens(), register_device=office.devices)
    secret = EnrolmentToken.parse(office.token()).secret
    csr = make_csr(new_key(), "press-7")
    for name, request in [("Press", csr), ("press-7", csr[:-1]), ("press-7", b"")]:
        with pytest.raises(EnrolmentError):
            enroller.enrol(secret, name, request)
    assert enroller.enrol(secret, "press-7", make_csr(new_key(), "other")).device_id == "press-7"


async def test_no_secret_is_logged(
    office: Office, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither on success nor on refusal, on either side."""
    caplog.set_level(logging.DEBUG)
    text = office.token()
    await enrol(text, tmp_path / "one", "press-7")
    with pytest.raises(EnrolmentError):
        await enrol(text, tmp_path / "two", "press-8")
    token = EnrolmentToken.parse(text)
    assert "press-7" in caplog.text
    for secret in (text, token.secret.hex(), repr(token.secret)):
        assert secret not in caplog.text
