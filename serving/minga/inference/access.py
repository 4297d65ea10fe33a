"""Who may ask a server what, and how often.

A server that is reached from other machines knows its callers: by API keys
(`Authorization: Bearer minga_...` over HTTP, the same as metadata over gRPC), or by client
certificates of an authority that it is told (mutual TLS). What only says that the server lives
is answered to everyone. Limits of rate are a key's own, in each process that serves.

The file of keys is read again when it changes: a key that is revoked is refused within a second.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from minga.inference.credentials import is_loopback
from minga.inference.errors import (
    AccessError,
    ForbiddenError,
    RateLimitedError,
    UnauthenticatedError,
)
from minga.inference.keys import KeyIndex, KeyRecord, KeyRing, Permission, Role
from minga.inference.tls import ServerTls

_LOG: Final = logging.getLogger(__name__)
_LOOK_EVERY_S: Final = 1.0
_SCHEME: Final = "bearer"
# What a client certificate lets its holder do; who manages models needs a key of that role.
_CERTIFIED: Final = Role.CALLER.permissions | Role.MONITOR.permissions


class KeyFile:
    """A file of keys, read again when it has changed.

    One that is gone or unreadable counts as empty: who cannot be checked is not let in.

    Args:
        path: the file.
        clock: seconds that only grow.

    Raises:
        AccessError: it cannot be read now.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._mark = self._mark_of_file()
        self._index = KeyIndex(KeyRing.read(path))
        self._looked_at = clock()

    def find(self, text: str) -> KeyRecord | None:
        """Give the record of a key that counts now; None for every other text."""
        now = self._clock()
        if now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            self._look()
        return self._index.find(text)

    def _look(self) -> None:
        mark = self._mark_of_file()
        if mark == self._mark:
            return
        self._mark = mark
        try:
            self._index = KeyIndex(KeyRing.read(self._path))
        except AccessError as error:
            _LOG.error("no key is let in: %s", error)
            self._index = KeyIndex(KeyRing.empty())

    def _mark_of_file(self) -> tuple[int, int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino, status.st_size


class Bucket:
    """A token bucket: so many requests a second, and so many at once after a pause.

    Kept as one number, the time at which the bucket would be full again (the generic cell rate
    algorithm, ITU-T I.371, 1993).

    Args:
        requests_per_s: how fast it fills.
        burst: how much it holds.
    """

    def __init__(self, requests_per_s: float, burst: int) -> None:
        self._interval_s = 1 / requests_per_s
        self._slack_s = (burst - 1) / requests_per_s
        self._full_at = 0.0

    def take(self, now: float) -> float:
        """Take a token, and give 0; or give the seconds until there is one."""
        full_at = max(self._full_at, now)
        wait_s = full_at - now - self._slack_s
        if wait_s > 1e-9:
            return wait_s
        self._full_at = full_at + self._interval_s
        return 0.0


class Access:
    """Lets requests in, or refuses them; for one event loop. Without arguments all are let in.

    Args:
        keys: the keys that count.
        certificates: client certificates count too.
        open_metrics: metrics are read without a key.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        keys: KeyFile | None = None,
        *,
        certificates: bool = False,
        open_metrics: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._certificates = certificates
        self._is_open = keys is None and not certificates
        self._open = frozenset({Permission.METRICS} if open_metrics else ())
        self._clock = clock
        self._buckets: dict[str, tuple[KeyRecord, Bucket]] = {}

    @property
    def is_open(self) -> bool:
        """Whether everyone is let in."""
        return self._is_open

    def admit(
        self, permission: Permission, authorization: str | None, *, certified: bool = False
    ) -> None:
        """Let a request in, and count it against its key's limit.

        Args:
            permission: what it needs leave for.
            authorization: the header, or gRPC's metadata, of that name.
            certified: whether the caller's certificate was verified on this connection.

        Raises:
            UnauthenticatedError: it has no key that counts.
            ForbiddenError: its key is not for this.
            RateLimitedError: its key has had its requests for now.
        """
        if self._is_open or permission in self._open:
            return
        record = self._record(authorization)
        if record is None:
            if certified and self._certificates:
                if permission in _CERTIFIED:
                    return
                raise ForbiddenError(
                    "a client certificate does not allow this, an operator's key does"
                )
            raise UnauthenticatedError(
                "this server wants an API key that is valid, as 'Authorization: Bearer KEY'"
            )
        if permission not in record.role.permissions:
            raise ForbiddenError(f"a key of the role '{record.role}' does not allow this")
        self._count(record)

    def _record(self, authorization: str | None) -> KeyRecord | None:
        if self._keys is None or not authorization:
            return None
        scheme, _, text = authorization.partition(" ")
        return self._keys.find(text.strip()) if scheme.lower() == _SCHEME else None

    def _count(self, record: KeyRecord) -> None:
        if record.requests_per_s is None:
            return
        kept, bucket = self._buckets.get(record.id, (None, None))
        if bucket is None or kept != record:
            bucket = Bucket(record.requests_per_s, record.burst)
            self._buckets[record.id] = record, bucket
        wait_s = bucket.take(self._clock())
        if wait_s:
            raise RateLimitedError(
                f"the key '{record.name}' may make {record.requests_per_s:g} requests a second; "
                f"try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """How a server is protected: names of files, so that it can be sent to other processes.

    Attributes:
        keys: the file of API keys; empty means there are none.
        certificate: the server's certificate chain in PEM; empty means no TLS.
        certificate_key: its private key in PEM.
        client_ca: who signs clients' certificates, in PEM; empty means nobody is asked for one.
        open_metrics: metrics are read without a key.
        allow_anonymous: answer everyone, also beyond this machine.
    """

    keys: str = ""
    certificate: str = ""
    certificate_key: str = ""
    client_ca: str = ""
    open_metrics: bool = False
    allow_anonymous: bool = False

    def check(self, host: str) -> None:
        """Check that a server on this address is protected as far as it has to be.

        Raises:
            AccessError: other machines reach it and it knows no callers, or a file is unusable.
        """
        if self.keys:
            KeyRing.read(Path(self.keys))
        if tls := self.tls():
            tls.context()
        elif self.client_ca:
            raise AccessError("a client CA needs TLS: give the server's certificate and key too")
        if not (is_loopback(host) or self.keys or self.client_ca or self.allow_anonymous):
            raise AccessError(
                f"on {host} other machines reach the models, and no caller would be known: make a "
                "key with `minga key create NAME`, or name a client CA; --allow-anonymous, or "
                "allow_anonymous = true, answers everyone"
            )
        if not (is_loopback(host) or tls):
            _LOG.warning(
                "on %s requests, answers and keys travel in the clear: give a certificate, or let "
                "a proxy in front end TLS",
                host,
            )

    def access(self) -> Access:
        """Make what lets requests in.

        Raises:
            AccessError: the keys cannot be read.
        """
        return Access(
            KeyFile(Path(self.keys)) if self.keys else None,
            certificates=bool(self.client_ca),
            open_metrics=self.open_metrics,
        )

    def tls(self) -> ServerTls | None:
        """Give the server's side of TLS; None means there is none.

        Raises:
            AccessError: of certificate and key one alone is given.
        """
        if bool(self.certificate) != bool(self.certificate_key):
            raise AccessError("TLS needs both the certificate and its private key")
        if not self.certificate:
            return None
        return ServerTls(
            certificate=Path(self.certificate),
            key=Path(self.certificate_key),
            client_ca=Path(self.client_ca) if self.client_ca else None,
        )
