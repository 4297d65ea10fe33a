"""Enrolment tokens: made by operators, redeemed by devices, kept as hashes.

Rules:

1. The store sees SHA-256 of a secret, never the secret. A plain hash is enough: the secret has
   256 random bits, so there is nothing to guess; and a look-up by hash leaks no useful timing.
2. A token lets in as many devices as it has uses, one unless said otherwise. A use belongs to the
   key that took it: the same key may redeem again while the token lasts, which is how a device
   whose answer got lost gets its certificate.
3. Redeeming is one atomic step of the store: of two keys after the last use, one gets it.
"""

import hashlib
import secrets
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum
from typing import Final, Protocol

from minga.federation.enrolment_token import EnrolmentToken
from minga.federation.errors import EnrolmentError
from minga.federation.identity import Clock, is_name, utc_now
from minga.federation.limits import MAX_TOKEN_USES, TOKEN_SECRET_BYTES


class Refusal(Enum):
    """Why a token is not redeemed, with what to tell the device."""

    UNKNOWN = "the coordinator knows no such enrolment token"
    USED = "the enrolment token was used already"
    EXPIRED = "the enrolment token has expired"


REMEDY: Final = "ask the operator for a new one"


class TokenStore(Protocol):
    """Keeps token hashes.

    Implementations may be called from several processes at once and are durable when a method
    returns. Times are seconds since the epoch.
    """

    def put(self, digest: bytes, group: str, expires_at: float, uses: int) -> None:
        """Keep a new token's hash (32 bytes)."""
        ...

    def redeem(self, digest: bytes, redeemer: bytes, now: float) -> str | Refusal:
        """Take one use for a redeemer, unless it has one, in one atomic step.

        Args:
            digest: The token's hash, 32 bytes.
            redeemer: Hash of the redeeming key, 32 bytes.
            now: The time.

        Returns:
            The token's group, or why it is refused.
        """
        ...


def token_name(secret: bytes) -> str:
    """Name a token without giving it away: the beginning of its hash, 16 characters."""
    return hashlib.sha256(secret).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIssuer:
    """Makes and redeems the tokens of one coordinator.

    Attributes:
        store: Where hashes are kept.
        enrol_address: `host:port` where devices redeem.
        device_address: `host:port` where enrolled devices connect.
        authority_der: The authority that tokens pin.
        intermediate_der: What issues in its name, if it is an offline root; else empty.
        clock: The time to issue and redeem by.
    """

    store: TokenStore
    enrol_address: str
    device_address: str
    authority_der: bytes
    intermediate_der: bytes = b""
    clock: Clock = utc_now

    def mint(self, group: str, lifetime: timedelta, uses: int = 1) -> str:
        """Make a token; its text is not kept anywhere.

        Args:
            group: The group that devices join by it.
            lifetime: How long it can be redeemed.
            uses: How many devices it lets in.

        Raises:
            EnrolmentError: the group's name, the lifetime or the number of uses is not possible.
        """
        if not is_name(group):
            raise EnrolmentError(
                f"group {group!r} is no name; use a-z, 0-9 and '-', at most 63 characters"
            )
        if lifetime <= timedelta(0):
            raise EnrolmentError(f"a token's lifetime must be positive, got {lifetime}")
        if not 1 <= uses <= MAX_TOKEN_USES:
            raise EnrolmentError(f"a token has 1 to {MAX_TOKEN_USES} uses, got {uses}")
        secret = secrets.token_bytes(TOKEN_SECRET_BYTES)
        expires_at = (self.clock() + lifetime).timestamp()
        self.store.put(hashlib.sha256(secret).digest(), group, expires_at, uses)
        token = EnrolmentToken(
            enrol_address=self.enrol_address,
            device_address=self.device_address,
            secret=secret,
            authority_der=self.authority_der,
            intermediate_der=self.intermediate_der,
        )
        return token.to_text()

    def redeem(self, secret: bytes, redeemer: bytes) -> str:
        """Take a use of a token for a key and give the token's group.

        Args:
            secret: The token's secret.
            redeemer: SHA-256 of the redeeming key.

        Raises:
            EnrolmentError: the token is unknown, used by another key, or expired.
        """
        digest = hashlib.sha256(secret).digest()
        result = self.store.redeem(digest, redeemer, self.clock().timestamp())
        if isinstance(result, Refusal):
            raise EnrolmentError(f"{result.value}; {REMEDY}")
        return result
