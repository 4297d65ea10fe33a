"""The device's side of enrolment: a token becomes an identity folder.

The folder gets, in this order: `key.pem`, made here and never sent; `coordinator.json`, `ca.pem`;
and last `cert.pem`, whose presence says that the device is enrolled. If anything breaks in between,
enrolling again with the same token and folder uses the same key, and the coordinator, which counts
a token's uses by key, answers again.
"""

import asyncio
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Self

from minga.federation import durable
from minga.federation.enrolment_token import EnrolmentToken
from minga.federation.errors import EnrolmentError, IdentityError, LimitError
from minga.federation.identity import (
    KEY_FILE,
    Identity,
    Role,
    accept_certificate,
    holds_identity,
    is_name,
    load_or_create_key,
    make_csr,
    save_identity,
    utc_now,
)
from minga.federation.limits import CALL_TIMEOUT_S, ENROLMENT_TRIES
from minga.federation.transfer import Retry
from minga.federation.transport import calling, open_pinned_channel
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1.federation_pb2_grpc import EnrollmentServiceStub

COORDINATOR_FILE: Final = "coordinator.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorAddress:
    """Where a device's coordinator is, each as `host:port`."""

    enrol_address: str
    device_address: str

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read it from an identity folder.

        Raises:
            IdentityError: the file is missing or damaged.
        """
        path = directory / COORDINATOR_FILE
        try:
            return cls(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError) as error:
            raise IdentityError(
                f"cannot read the coordinator's address from {path}; enrol this device"
            ) from error

    def save(self, directory: Path) -> None:
        """Write it into an identity folder."""
        text = json.dumps(asdict(self), indent=2) + "\n"
        durable.replace_file(directory / COORDINATOR_FILE, text.encode())


PATIENCE: Final = Retry(attempts=ENROLMENT_TRIES, first_delay_s=1.0, max_delay_s=30.0)
"""How a device waits for its turn while too many others enrol."""


async def enrol(
    token_text: str, directory: Path, name: str, *, retry: Retry = PATIENCE
) -> Identity:
    """Enrol this machine as a device.

    Args:
        token_text: The enrolment token that the operator gave.
        directory: The identity folder; made if missing.
        name: The device's name: a-z, 0-9 and '-'.
        retry: How patient to be while too many others enrol.

    Raises:
        EnrolmentError: the token or the name is refused, or the folder has an identity already.
        IdentityError: who answered is not the coordinator that the token names.
        UnreachableError: nobody answered; the same token may be tried again.
        LimitError: too many others enrol, also after that patience.
    """
    token = EnrolmentToken.parse(token_text)
    if not is_name(name):
        raise EnrolmentError(
            f"device name {name!r} is not possible; use a-z, 0-9 and '-', "
            "beginning with a letter or digit, at most 63 characters"
        )
    if holds_identity(directory):
        raise EnrolmentError(
            f"{directory} holds an identity already; use another folder, or remove this one"
        )
    key = load_or_create_key(directory / KEY_FILE)
    response = await _redeem(token, name, make_csr(key, name), retry)
    # The authority stays the token's, whatever the answer says; and the clock of a machine that was
    # never online may be wrong: then it is told so here.
    identity = accept_certificate(
        response.certificate,
        key,
        expected=(Role.DEVICE, name),
        authority=token.authority,
        issuer=token.issuer,
        now=utc_now(),
    )
    CoordinatorAddress(enrol_address=token.enrol_address, device_address=token.device_address).save(
        directory
    )
    save_identity(directory, identity)
    return identity


async def _redeem(token: EnrolmentToken, name: str, csr: bytes, retry: Retry) -> pb.EnrollResponse:
    """Ask for a certificate, again after a pause while too many others ask."""
    request = pb.EnrollRequest(
        token_secret=token.secret, device_name=name, certificate_signing_request=csr
    )
    failures = 0
    async with open_pinned_channel(token.enrol_address, token.issuer) as channel:
        stub = EnrollmentServiceStub(channel)
        while True:
            try:
                with calling(token.enrol_address):
                    return await stub.Enroll(request, timeout=CALL_TIMEOUT_S)
            except LimitError:
                failures += 1
                if failures >= retry.attempts:
                    raise
                await asyncio.sleep(retry.delay_s(failures))
