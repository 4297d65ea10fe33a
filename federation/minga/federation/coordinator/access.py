"""Who may call what: one table, enforced by one interceptor.

A method that is not in the table is refused to everybody: forgetting a row locks out, never in.
The caller's role and name come from the certificate that TLS accepted, never from a message.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import lru_cache
from types import TracebackType
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from minga.federation.certificates import chain_to_der, is_newer
from minga.federation.coordinator.calls import Call, RunningCalls
from minga.federation.errors import AccessError, IdentityError
from minga.federation.identity import (
    Clock,
    Principal,
    Role,
    principal_of,
    utc_now,
    verify_certificate,
    verify_chain,
)
from minga.federation.interception import Context, Handler, around, reading_anything
from minga.federation.limits import REFUSAL_GRACE_S, VERIFIED_CERTIFICATES


class Everybody(Enum):
    """Stands for all callers, with or without a certificate."""

    ANYBODY = "anybody"


_PACKAGE: Final = "/minga.federation.v1"
_RENEW: Final = f"{_PACKAGE}.IdentityService/Renew"
_SESSION: Final = f"{_PACKAGE}.FederationService/Session"
_DEVICES: Final = frozenset({Role.DEVICE})
_OPERATORS: Final = frozenset({Role.OPERATOR})

ALLOWED: Final[Mapping[str, frozenset[Role] | Everybody]] = {
    # Its proof is the enrolment token.
    f"{_PACKAGE}.EnrollmentService/Enroll": Everybody.ANYBODY,
    _RENEW: _DEVICES,
    _SESSION: _DEVICES,
    f"{_PACKAGE}.BlobService/Upload": _DEVICES | _OPERATORS,
    f"{_PACKAGE}.BlobService/GetUploadOffset": _DEVICES | _OPERATORS,
    f"{_PACKAGE}.BlobService/Download": _DEVICES | _OPERATORS,
    f"{_PACKAGE}.OperatorService/CreateToken": _OPERATORS,
    f"{_PACKAGE}.OperatorService/ListDevices": _OPERATORS,
    f"{_PACKAGE}.OperatorService/RevokeDevice": _OPERATORS,
    f"{_PACKAGE}.OperatorService/RevokeIdentity": _OPERATORS,
    f"{_PACKAGE}.OperatorService/StartCampaign": _OPERATORS,
    f"{_PACKAGE}.OperatorService/WatchCampaign": _OPERATORS,
    f"{_PACKAGE}.OperatorService/CancelCampaign": _OPERATORS,
    f"{_PACKAGE}.OperatorService/PublishModel": _OPERATORS,
    f"{_PACKAGE}.OperatorService/GetStatus": _OPERATORS,
}
"""RPC method -> the roles that may call it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gatekeeper:
    """Decides whether a caller may call.

    Attributes:
        authority: Issuer of all client certificates.
        is_revoked: Tells whether a principal is refused from now on.
        clock: The time to check certificates by.
        root: The offline root that signed `authority`, if there is one.
        key_on_record: Gives SHA-256 of the public key that a device enrolled with, 32 bytes; needed
            under an offline root.
    """

    authority: x509.Certificate
    is_revoked: Callable[[Principal], bool]
    clock: Clock = utc_now
    root: x509.Certificate | None = None
    key_on_record: Callable[[str], bytes | None] = field(default=lambda _: None)

    def admit(
        self, method: str, certificate_pem: bytes | None, intermediate_pem: bytes | None = None
    ) -> Principal | None:
        """Let a call pass, or refuse it.

        TLS has checked the certificate once, when the connection was made; here it is checked at
        each call, since connections outlive certificates.

        Args:
            method: `/package.Service/Method`.
            certificate_pem: The caller's certificate, if it has shown one.
            intermediate_pem: What it has shown as its issuer, if it did.

        Returns:
            Who calls; None where everybody may.

        Raises:
            IdentityError: no certificate, or one that does not hold (any more).
            AccessError: the caller's role is not among those allowed.
        """
        allowed = ALLOWED.get(method, frozenset())
        if isinstance(allowed, Everybody):
            return None
        principal = self._authenticate(method, certificate_pem, intermediate_pem)
        if principal.role not in allowed:
            raise AccessError(f"{principal} may not call {method.rpartition('/')[2]}")
        return principal

    def _authenticate(
        self, method: str, certificate_pem: bytes | None, intermediate_pem: bytes | None
    ) -> Principal:
        certificate = _load(certificate_pem)
        intermediate = self._other_issuer(intermediate_pem)
        if intermediate is None:
            der = certificate.public_bytes(Encoding.DER)
            principal = verify_certificate(der, self.authority, self.clock())
        else:
            principal = self._enrolled_before(method, certificate, intermediate)
        if self.is_revoked(principal):
            raise revoked(principal)
        return principal

    def _other_issuer(self, intermediate_pem: bytes | None) -> x509.Certificate | None:
        """Give the intermediate that a caller hangs by, if it is not the one in use."""
        if self.root is None or not intermediate_pem:
            return None
        intermediate = _load(intermediate_pem)
        return None if intermediate == self.authority else intermediate

    def _enrolled_before(
        self,
        method: str,
        certificate: x509.Certificate,
        intermediate: x509.Certificate,
    ) -> Principal:
        """Know a device by a certificate of an intermediate that was replaced, for renewal alone.

        Whoever has that intermediate's key can issue a certificate to any name, but not for the
        key that the device enrolled with and holds.
        """
        assert self.root is not None
        chain = chain_to_der(certificate, intermediate)
        issuer, principal = verify_chain(chain, self.root, self.clock())
        if not is_newer(self.authority, issuer):
            raise IdentityError(
                f"{principal} knows intermediate {issuer.serial_number} and this coordinator has "
                f"{self.authority.serial_number}; install the newest one"
            )
        if method != _RENEW:
            raise IdentityError(
                f"the intermediate that issued the certificate of {principal} was replaced; "
                "renew the certificate first"
            )
        if principal.key_digest != self.key_on_record(principal.name):
            raise IdentityError(f"the certificate of {principal} is for a key that never enrolled")
        return principal


def revoked(principal: Principal) -> IdentityError:
    """Make the error that says that somebody counts no more."""
    remedy = (
        "ask the operator to let it in again"
        if principal.role is Role.DEVICE
        else f"copy the folder {principal.name!r} of the coordinator's state again"
    )
    return IdentityError(f"{principal} was revoked; {remedy}")


STRANGER: Final = "stranger"
"""Stands for a caller without a certificate."""

OnRefused = Callable[[str, str, str, IdentityError], None]
"""Hears of a refusal: caller (`device/press-7`, or `STRANGER`), its address, method, and why."""


def _pass_over(caller: str, peer: str, method: str, error: IdentityError) -> None:
    """Hear of a refusal and do nothing."""


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Asks the gatekeeper before each call; goes behind `transport.ErrorInterceptor`.

    Args:
        gatekeeper: Who decides.
        on_refused: Hears of its refusals, and of those that a call's handler makes by the caller's
            role or name.
        calls: Where calls that were admitted are noted, but for control streams.
    """

    def __init__(
        self,
        gatekeeper: Gatekeeper,
        on_refused: OnRefused = _pass_over,
        *,
        calls: RunningCalls | None = None,
    ) -> None:
        self._gatekeeper = gatekeeper
        self._on_refused = on_refused
        self.calls = calls or RunningCalls()

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Put the check in front of a call."""
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            return None

        method: str = handler_call_details.method

        def admitting(context: Context) -> _Admission:
            return _Admission(self, method, context, is_stream=handler.request_streaming)

        return around(reading_anything(handler), admitting)

    async def admit(self, method: str, context: Context, *, is_stream: bool) -> Call | None:
        """Let a call pass, or refuse it and say so; raises as `Gatekeeper.admit` does.

        Returns:
            What to leave when it is over; None if it is not noted.
        """
        try:
            principal = self._gatekeeper.admit(
                method, _certificate_pem_of(context), _intermediate_pem_of(context)
            )
            is_noted = principal is not None and method != _SESSION
            return self.calls.begin(principal.path) if principal and is_noted else None
        except IdentityError as error:
            if is_stream:
                await _take_opening(context)
            self.tell(method, context, error)
            raise

    def tell(self, method: str, context: Context, error: IdentityError) -> None:
        """Say that a call is refused."""
        self._on_refused(_caller_of(context), context.peer(), method, error)


class _Admission:
    """One call's way past the gatekeeper.

    A class, and no generator: there is one for each open stream, of which most only wait.
    """

    __slots__ = ("_call", "_context", "_interceptor", "_is_stream", "_method")

    def __init__(
        self, interceptor: AccessInterceptor, method: str, context: Context, *, is_stream: bool
    ) -> None:
        self._interceptor = interceptor
        self._method = method
        self._context = context
        self._is_stream = is_stream
        self._call: Call | None = None

    async def __aenter__(self) -> None:
        """Let the handler begin, or refuse the call."""
        self._call = await self._interceptor.admit(
            self._method, self._context, is_stream=self._is_stream
        )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Say it if the handler itself refused the caller, or was ended because of a revocation."""
        if self._call is not None:
            self._interceptor.calls.leave(self._call)
            if self._call.is_ended and isinstance(error, asyncio.CancelledError):
                self._call.task.uncancel()
                error = refusal = revoked(principal_of_call(self._context))
                self._interceptor.tell(self._method, self._context, refusal)
                raise refusal
        if isinstance(error, IdentityError):
            self._interceptor.tell(self._method, self._context, error)


def principal_of_call(context: Context) -> Principal:
    """Give the caller of a call that passed the interceptor.

    Raises:
        IdentityError: the caller has shown no certificate.
    """
    return principal_of(_load(_certificate_pem_of(context)))


def _caller_of(context: Context) -> str:
    """Name the caller of a call that was refused, whatever it has shown."""
    try:
        return principal_of_call(context).path
    except IdentityError:
        return STRANGER


async def _take_opening(context: Context) -> None:
    """Read what a stream opens with, although it is refused.

    A client of grpc.aio that is still writing when the refusal arrives learns that its message
    was not sent, and not why.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(REFUSAL_GRACE_S):
            await context.read()


def _certificate_pem_of(context: Context) -> bytes | None:
    return next(iter(context.auth_context().get("x509_pem_cert", ())), None)


def _intermediate_pem_of(context: Context) -> bytes | None:
    """Give what came behind the caller's own certificate; gRPC 1.85 tells it without that one."""
    return next(iter(context.auth_context().get("x509_pem_cert_chain", ())), None)


@lru_cache(maxsize=VERIFIED_CERTIFICATES)
def _load(certificate_pem: bytes | None) -> x509.Certificate:
    if certificate_pem is None:
        raise IdentityError("this call needs a client certificate; enrol first")
    try:
        return x509.load_pem_x509_certificate(certificate_pem)
    except ValueError as error:
        raise IdentityError(f"the client certificate cannot be read ({error})") from error
