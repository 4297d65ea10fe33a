"""The file of API keys, changed: keys made, listed and revoked.

Two processes that change one file take turns. A revoked key stays in the file, so that its story
can be read; its hash stays with it and opens nothing.
"""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from math import ceil
from pathlib import Path

from minga.federation.durable import PRIVATE, replace_file
from minga.inference.errors import AccessError
from minga.inference.keys import MAX_NAME_LENGTH, KeyRecord, KeyRing, Role, new_key


class KeyStore:
    """One file of keys.

    Args:
        file: where it is; made with the first key, for its owner alone.
        now: tells the time.
    """

    def __init__(self, file: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)):
        self._file = file
        self._now = now

    def create(
        self,
        name: str,
        *,
        role: Role = Role.CALLER,
        days: float | None = None,
        requests_per_s: float | None = None,
        burst: int | None = None,
    ) -> tuple[str, KeyRecord]:
        """Make a key.

        Args:
            name: whose it is; no other key that counts has the name.
            role: what it may do.
            days: how long it counts; None means until it is revoked.
            requests_per_s: how many requests it may make a second, on average; None means any.
            burst: how many of them at once; by default those of a second.

        Returns:
            The key, which is kept nowhere, and its record.

        Raises:
            AccessError: the name is none or is taken, or the file cannot be read or written.
        """
        if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_LENGTH:
            raise AccessError(
                f"{name!r:.120} is no name for a key: write 1 to {MAX_NAME_LENGTH} printable "
                "characters"
            )
        with self._changing() as ring:
            now = self._now()
            if any(one.name == name and one.state(now) == "valid" for one in ring.keys):
                raise AccessError(
                    f"there is a key {name!r} already: revoke it first, or choose another name"
                )
            text, key_id, secret = new_key()
            record = KeyRecord(
                id=key_id,
                name=name,
                role=role,
                hash=ring.hash_of(secret),
                created_at=now,
                expires_at=None if days is None else now + timedelta(days=days),
                requests_per_s=requests_per_s,
                burst=burst or max(1, ceil(requests_per_s or 1)),
            )
            self._write(ring.model_copy(update={"keys": (*ring.keys, record)}))
        return text, record

    def list(self) -> tuple[tuple[KeyRecord, str], ...]:
        """Give all keys, the oldest first, each with its state.

        Raises:
            AccessError: the file cannot be read.
        """
        now = self._now()
        return tuple((record, record.state(now)) for record in KeyRing.read(self._file).keys)

    def revoke(self, key: str) -> KeyRecord:
        """Let a key count no more; servers notice within a second.

        Args:
            key: its id, or its name.

        Raises:
            AccessError: there is no such key, or the file cannot be read or written.
        """
        with self._changing() as ring:
            now = self._now()
            found = [one for one in ring.keys if key in (one.id, one.name) and not one.revoked_at]
            if not found:
                raise AccessError(f"there is no key {key!r} to revoke; `minga key list` shows all")
            revoked = {one.id: one.model_copy(update={"revoked_at": now}) for one in found}
            keys = tuple(revoked.get(one.id, one) for one in ring.keys)
            self._write(ring.model_copy(update={"keys": keys}))
        return revoked[found[-1].id]

    @contextmanager
    def _changing(self) -> Iterator[KeyRing]:
        """Give the ring, and let no other process change it meanwhile."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.with_name(f"{self._file.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield KeyRing.read(self._file) if self._file.exists() else KeyRing.empty()
        except OSError as error:
            raise AccessError(f"cannot write the keys in {self._file}: {error.strerror}") from error

    def _write(self, ring: KeyRing) -> None:
        replace_file(self._file, ring.model_dump_json(indent=2).encode() + b"\n", mode=PRIVATE)
