"""The device's link to its coordinator: a channel that changes when the certificate does.

Rules:

1. A certificate is renewed after about two thirds of its lifetime: looked at when the device
   connects and once a minute, by the wall clock.
2. The new certificate is on the disk before it is used; the key stays the same.
3. Whoever is at work on the channel from before, a transfer or the control stream, ends there: the
   certificate before is still valid for a third of its lifetime. The channel is closed after its
   last user left.
4. A failed renewal is tried again until the certificate ends; then only a new enrolment helps.
5. The coordinator must be known to the issuer that this device knows. Under an offline root it may
   have a newer one: then the device asks it for a certificate of that, as for a renewal, and trusts
   nobody else from then on. An older issuer is refused, also after a restart.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc

from minga.federation import transport
from minga.federation.certificates import renewal_time
from minga.federation.errors import FederationError, StorageError
from minga.federation.identity import (
    Clock,
    Identity,
    accept_certificate,
    make_csr,
    utc_now,
    verify_certificate,
)
from minga.federation.limits import CALL_TIMEOUT_S, RENEWAL_CHECK_S
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1.federation_pb2_grpc import IdentityServiceStub

_log = logging.getLogger(__name__)

Keep = Callable[[Identity], None]
"""Writes a renewed identity where the device finds it at its next start; may block."""


@dataclass(slots=True, eq=False)
class _Line:
    """One channel and how many are using it."""

    channel: grpc.aio.Channel
    num_users: int = 0


class Link:
    """The way to one coordinator.

    Args:
        address: The coordinator's device port, `host:port`.
        identity: Who this device is.
        keep: Where a renewed identity is written.
        clock: The time to check certificates by.
        check_interval_s: How often `keep_valid` looks.

    Raises:
        IdentityError: the certificate is foreign or expired.
    """

    def __init__(
        self,
        address: str,
        identity: Identity,
        *,
        keep: Keep,
        clock: Clock = utc_now,
        check_interval_s: float = RENEWAL_CHECK_S,
    ) -> None:
        self.address = address
        self.identity = identity
        self._keep = keep
        self._clock = clock
        self._check_interval_s = check_interval_s
        self._line = _Line(transport.open_channel(address, identity, clock=clock))
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    @property
    def changed(self) -> asyncio.Event:
        """The event that the next change of the channel sets."""
        return self._changed

    def valid_until(self) -> float:
        """Say when the certificate ends, in seconds since 1970."""
        return self.identity.certificate.not_valid_after_utc.timestamp()

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        """Lend the newest channel; it stays open for as long as it is in use."""
        line = self._line
        line.num_users += 1
        try:
            yield line.channel
        finally:
            line.num_users -= 1
            if line is not self._line and not line.num_users:
                await line.channel.close()

    async def close(self) -> None:
        """Close the newest channel, whoever uses it; older ones close behind their last user."""
        await self._line.channel.close()

    async def keep_valid(self) -> None:
        """Renew the certificate whenever it is due, until cancelled."""
        while True:
            await asyncio.sleep(self._check_interval_s)
            await self.try_to_renew()

    async def try_to_renew(self) -> None:
        """Renew the certificate if it is time; a failure is logged, there will be other times."""
        try:
            await self.renew_if_due()
        except FederationError as error:
            _log.warning("the certificate is not renewed, trying again: %s", error)

    def require_valid(self) -> None:
        """Make sure that the coordinator would take the certificate: else it only hangs up.

        Raises:
            IdentityError: the certificate has expired, or the clock is far off.
        """
        verify_certificate(self.identity.certificate_der, self.identity.issuer, self._clock())

    async def renew_if_due(self) -> None:
        """Renew the certificate if it is time.

        Raises:
            IdentityError: the certificate has expired, was revoked, or the answer is not ours.
            StorageError: the new certificate could not be kept.
            FederationError: the coordinator was not reached, or refused.
        """
        async with self._turn:
            if self._clock() < renewal_time(self.identity.certificate):
                return
            self.require_valid()
            async with self.channel() as channel:
                renewed = await self._ask(channel)
            await self._take(renewed)

    async def follow(self) -> bool:
        """Go over to the coordinator's issuer if it is newer than the one known; True if so.

        Raises:
            IdentityError: the coordinator's issuer is older, or another root's, or this device is
                refused.
            StorageError: the new certificate could not be kept.
            FederationError: the coordinator was not reached.
        """
        async with self._turn:
            before = self.identity.intermediate
            if before is None:
                return False
            self.require_valid()
            async with transport.open_channel(
                self.address, self.identity, clock=self._clock, any_intermediate=True
            ) as channel:
                renewed = await self._ask(channel)
            if renewed.intermediate == before:
                return False
            await self._take(renewed)
            _log.info("the federation's authority issues with another intermediate from now on")
            return True

    async def _ask(self, channel: grpc.aio.Channel) -> Identity:
        """Ask for a new certificate and check what comes."""
        identity = self.identity
        request = pb.RenewRequest(certificate_signing_request=make_csr(identity.key, identity.name))
        with transport.calling(self.address):
            response = await IdentityServiceStub(channel).Renew(request, timeout=CALL_TIMEOUT_S)
        return accept_certificate(
            response.certificate,
            identity.key,
            expected=(identity.role, identity.name),
            authority=identity.authority,
            issuer=identity.issuer,
            now=self._clock(),
        )

    async def _take(self, renewed: Identity) -> None:
        """Use a new certificate from now on, once it is on the disk."""
        try:
            await asyncio.to_thread(self._keep, renewed)
        except OSError as error:
            raise StorageError(f"cannot keep the new certificate ({error})") from error
        await self._switch_to(renewed)

    async def _switch_to(self, identity: Identity) -> None:
        older = self._line
        self._line = _Line(transport.open_channel(self.address, identity, clock=self._clock))
        self.identity = identity
        _log.info(
            "renewed the certificate; it is valid until %s",
            identity.certificate.not_valid_after_utc.isoformat(),
        )
        self._changed.set()
        self._changed = asyncio.Event()
        if not older.num_users:
            await older.channel.close()
