"""The audit log: who was let in, refused or changed, in an order that nobody changes unnoticed.

Rules:

1. Entries are numbered from 1 without a gap. The hash of each covers its fields and the hash of
   the one before, so a change, a removal or a swap breaks every hash that follows.
2. What is hashed and signed is canonical JSON: keys sorted, no blanks, ASCII. A line of an export
   must be canonical to the byte; there is one way to write a record.
3. A checkpoint is a signature under the number and hash of one entry, by a key that the authority
   certified for `service/audit`. It also names the checkpoint before. Without the key, nobody can
   compute the hashes anew behind a change.
4. From the entry on that says that the audit key was revoked, it signs nothing that counts.
5. Verifying needs the authority's certificate and nothing else: under an offline root a checkpoint
   brings the intermediate with it.

What a log cannot show of itself: that its end is missing. A log that was cut back looks like the
log at that moment; entries after its last checkpoint are chained but not signed. Only a copy kept
elsewhere shows that: `require_extension`. And whoever has the key can write another history; a copy
shows that too.

Not here: SQLite and the moments when entries and checkpoints are made (`coordinator.audit_log`).
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from typing import Any, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from minga.federation.certificates import (
    digest_of_key,
    is_newer,
    issuer_of,
    p256_key,
    parse_chain,
)
from minga.federation.errors import AuditError, IdentityError
from minga.federation.identity import CertificateVerifier, Identity, Role

AUDITOR: Final = "audit"
"""Name of the service whose certificate signs checkpoints."""

IDENTITY_REVOKED: Final = "identity-revoked"
"""Kind of the entry after which a key of the coordinator's own counts no more."""

NOTHING: Final = bytes(32)
"""What the first entry has in place of the hash before it."""

_ENTRY_PREFIX: Final = b"minga.federation.v1/audit-entry\x00"
_CHECKPOINT_PREFIX: Final = b"minga.federation.v1/audit-checkpoint\x00"
_REMEDY: Final = "compare it with an export that was kept elsewhere, and find out who wrote here"

Detail = str | int | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One event.

    Attributes:
        sequence: Its number, from 1 on.
        time: When it was written, as `format_time` writes it.
        kind: What happened, for instance `device-revoked`.
        subject: To whom, for instance `device/press-7`.
        details: What else is worth knowing; never a secret.
        previous: Hash of the entry before, 32 bytes.
        hash: Hash of this one, 32 bytes.
    """

    sequence: int
    time: str
    kind: str
    subject: str
    details: Mapping[str, Any]
    previous: bytes
    hash: bytes

    def __post_init__(self) -> None:
        """Refuse other types than those above, which a forged record may have.

        Raises:
            TypeError: a field has another type.
        """
        _require_types(self, int, str, str, str, dict, bytes, bytes)

    @classmethod
    def following(
        cls,
        sequence: int,
        previous: bytes,
        *,
        time: datetime,
        kind: str,
        subject: str,
        details: Mapping[str, Detail],
    ) -> Self:
        """Make the entry that comes after another one's number and hash; 0 and `NOTHING` at first.

        Raises:
            ValueError: the details are no JSON.
        """
        unsealed = cls(
            sequence=sequence + 1,
            time=format_time(time),
            kind=kind,
            subject=subject,
            details=dict(details),
            previous=previous,
            hash=b"",
        )
        return replace(unsealed, hash=_hash(unsealed._fields()))

    def to_json(self) -> dict[str, Any]:
        """Give the entry as an export has it."""
        return {**self._fields(), "hash": self.hash.hex(), "type": "entry"}

    def is_intact(self) -> bool:
        """Tell whether the hash fits the content."""
        return _hash(self._fields()) == self.hash

    def _fields(self) -> dict[str, Any]:
        return {
            "sequence": self.sequence,
            "time": self.time,
            "kind": self.kind,
            "subject": self.subject,
            "details": self.details,
            "previous": self.previous.hex(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A signature under all entries up to one.

    Attributes:
        sequence: Number of that entry.
        hash: Its hash, 32 bytes.
        time: When it was signed, as `format_time` writes it.
        previous_checkpoint: Number of the entry that the checkpoint before signed; 0 for none.
        certificate: The signer's, DER; under an offline root with its intermediate behind it.
        signature: ECDSA over SHA-256, DER.
    """

    sequence: int
    hash: bytes
    time: str
    previous_checkpoint: int
    certificate: bytes
    signature: bytes

    def __post_init__(self) -> None:
        """Refuse other types than those above, which a forged record may have.

        Raises:
            TypeError: a field has another type.
        """
        _require_types(self, int, bytes, str, int, bytes, bytes)

    @classmethod
    def signed(
        cls, signer: Identity, *, sequence: int, digest: bytes, time: datetime, previous: int
    ) -> Self:
        """Sign the entry of a number and hash; `previous` is the number that was signed before."""
        message = _checkpoint_message(sequence, digest, format_time(time), previous)
        return cls(
            sequence=sequence,
            hash=digest,
            time=format_time(time),
            previous_checkpoint=previous,
            certificate=signer.chain_der,
            signature=signer.sign(message),
        )

    def to_json(self) -> dict[str, Any]:
        """Give the checkpoint as an export has it."""
        return {
            "sequence": self.sequence,
            "hash": self.hash.hex(),
            "time": self.time,
            "previous_checkpoint": self.previous_checkpoint,
            "certificate": base64.b64encode(self.certificate).decode(),
            "signature": base64.b64encode(self.signature).decode(),
            "type": "checkpoint",
        }

    def verify(self, authority: x509.Certificate) -> tuple[x509.Certificate, bytes]:
        """Check the signature, by the certificate as it held when it was made.

        Returns:
            Its issuer, and SHA-256 of the key that signed, 32 bytes.

        Raises:
            AuditError: it is not by this federation's audit key.
        """
        message = _checkpoint_message(self.sequence, self.hash, self.time, self.previous_checkpoint)
        try:
            signed_at = parse_time(self.time)
            leaf, intermediate = parse_chain(self.certificate)
            issuer = issuer_of(intermediate, authority)
            verifier = CertificateVerifier(
                authority=issuer, clock=lambda: signed_at, role=Role.SERVICE
            )
            leaf_der = leaf.public_bytes(Encoding.DER)
            verifier.verify(AUDITOR, leaf_der, self.signature, message)
        except (IdentityError, ValueError) as error:
            raise broken(
                f"the checkpoint of entry {self.sequence} is not valid: {error}"
            ) from error
        return issuer, digest_of_key(p256_key(leaf))


Record = Entry | Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a log that verified holds.

    Attributes:
        num_entries: Entries, all chained.
        num_checkpoints: Checkpoints, all signed by the federation's audit key.
        signed_until: Number of the last entry that a checkpoint covers; 0 for none.
        last_time: When the last entry was written.
        last_hash: Its hash: whoever keeps it elsewhere can tell later whether the log still has it.
    """

    num_entries: int
    num_checkpoints: int
    signed_until: int
    last_time: str
    last_hash: bytes


def verify(records: Iterable[Record], authority: x509.Certificate) -> Report:
    """Check a whole log, in one pass and with the memory of one record.

    Args:
        records: Entries in order, each checkpoint directly behind the entry that it signs.
        authority: The federation's, from a source that whoever could change the log cannot change,
            for instance a device's `ca.pem`.

    Raises:
        AuditError: something was altered, removed, moved or forged, or there is no entry at all;
            the message says where.
    """
    sequence, num_checkpoints, signed_until = 0, 0, 0
    last_hash, last_time = NOTHING, ""
    issuer: x509.Certificate | None = None
    revoked: set[str] = set()
    for record in records:
        if isinstance(record, Checkpoint):
            _check_place(record, sequence, last_hash, signed_until)
            next_issuer, key_digest = record.verify(authority)
            issuer = _later_issuer(issuer, next_issuer, record.sequence)
            if key_digest.hex() in revoked:
                raise broken(f"the checkpoint of entry {sequence} is by a key that was revoked")
            num_checkpoints, signed_until = num_checkpoints + 1, record.sequence
            continue
        _check_entry(record, sequence, last_hash)
        sequence, last_hash, last_time = record.sequence, record.hash, record.time
        if record.kind == IDENTITY_REVOKED:
            revoked.add(str(record.details.get("key")))
    if sequence == 0:
        raise broken("the log is empty, but every coordinator writes an entry when it starts")
    return Report(
        num_entries=sequence,
        num_checkpoints=num_checkpoints,
        signed_until=signed_until,
        last_time=last_time,
        last_hash=last_hash,
    )


def _check_entry(entry: Entry, sequence: int, last_hash: bytes) -> None:
    expected = sequence + 1
    if entry.sequence != expected:
        raise broken(
            f"entry {expected} is missing or moved: entry {entry.sequence} is in its place"
        )
    if entry.previous != last_hash:
        raise broken(f"entry {expected} does not follow the entry before it")
    if not entry.is_intact():
        raise broken(f"entry {expected} was altered: its hash does not fit its content")


def _later_issuer(
    issuer: x509.Certificate | None, next_issuer: x509.Certificate, sequence: int
) -> x509.Certificate:
    """Let intermediates follow each other in their order: a replaced one signs no more."""
    if issuer is not None and next_issuer != issuer and not is_newer(next_issuer, issuer):
        raise broken(
            f"the checkpoint of entry {sequence} is by the key of an intermediate that was "
            "replaced before"
        )
    return next_issuer


def _check_place(
    checkpoint: Checkpoint, sequence: int, last_hash: bytes, signed_until: int
) -> None:
    if checkpoint.sequence > sequence:
        raise broken(
            f"the log ends with entry {sequence}, but entry {checkpoint.sequence} was signed: "
            "its end was cut off"
        )
    if checkpoint.sequence < sequence:
        raise broken(f"the checkpoint of entry {checkpoint.sequence} is not behind its entry")
    if checkpoint.hash != last_hash:
        raise broken(f"entry {sequence} is not the one that was signed: history was rewritten")
    if checkpoint.previous_checkpoint != signed_until:
        raise broken(
            f"between the checkpoints of entries {signed_until} and {sequence}, the one of entry "
            f"{checkpoint.previous_checkpoint} is missing or moved"
        )


def require_extension(log: Iterable[Record], kept: Iterable[Record]) -> None:
    """Check that a log still holds all that an earlier copy of it holds.

    Raises:
        AuditError: an entry of the copy is gone or another one; this also shows what somebody with
            the audit key did.
    """
    entries = (record for record in log if isinstance(record, Entry))
    for record in kept:
        if isinstance(record, Checkpoint):
            continue
        entry = next(entries, None)
        if entry is None:
            raise broken(f"the copy has entry {record.sequence}, the log ends before it")
        if entry != record:
            raise broken(f"entry {record.sequence} is another one than in the copy")


# -- lines of an export -----------------------------------------------------------------------


def to_line(record: Record) -> str:
    """Write a record as one line, without its end."""
    return canonical(record.to_json())


def from_line(line: str) -> Record:
    """Read a record from one line, without its end.

    Raises:
        AuditError: the line is none, or not exactly as `to_line` writes it.
    """
    try:
        content = json.loads(line)
        record = _CLASSES[content["type"]](content)
        if to_line(record) != line:
            raise ValueError("it is not canonical")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise broken(f"the line {line[:60]!r}... is no record of an audit log ({error})") from error
    return record


def _entry_of(content: dict[str, Any]) -> Entry:
    return Entry(
        sequence=content["sequence"],
        time=content["time"],
        kind=content["kind"],
        subject=content["subject"],
        details=content["details"],
        previous=bytes.fromhex(content["previous"]),
        hash=bytes.fromhex(content["hash"]),
    )


def _checkpoint_of(content: dict[str, Any]) -> Checkpoint:
    return Checkpoint(
        sequence=content["sequence"],
        hash=bytes.fromhex(content["hash"]),
        time=content["time"],
        previous_checkpoint=content["previous_checkpoint"],
        certificate=base64.b64decode(content["certificate"]),
        signature=base64.b64decode(content["signature"]),
    )


_CLASSES: Final[dict[str, Callable[[dict[str, Any]], Record]]] = {
    "entry": _entry_of,
    "checkpoint": _checkpoint_of,
}


# -- bytes ------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """Write JSON in the one way that is hashed.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def format_time(time: datetime) -> str:
    """Write a time in UTC, to the microsecond: `2026-03-01T12:00:00.000000+00:00`."""
    return time.astimezone(UTC).isoformat(timespec="microseconds")


def parse_time(text: str) -> datetime:
    """Read what `format_time` wrote.

    Raises:
        ValueError: it did not write that.
    """
    time = datetime.fromisoformat(text)
    if time.tzinfo is None or format_time(time) != text:
        raise ValueError(f"{text!r} is no time of an audit log")
    return time


def broken(what: str) -> AuditError:
    """Make the error that says that a log is not what was written."""
    return AuditError(f"the audit log is broken: {what}; {_REMEDY}")


def _require_types(record: Record, *kinds: type) -> None:
    for field, kind in zip(fields(record), kinds, strict=True):
        value = getattr(record, field.name)
        if type(value) is not kind:  # True is no number here
            raise TypeError(f"{field.name} is {type(value).__name__}, expected {kind.__name__}")


def _hash(content: Mapping[str, Any]) -> bytes:
    return hashlib.sha256(_ENTRY_PREFIX + canonical(content).encode()).digest()


def _checkpoint_message(sequence: int, digest: bytes, time: str, previous: int) -> bytes:
    content = {
        "sequence": sequence,
        "hash": digest.hex(),
        "time": time,
        "previous_checkpoint": previous,
    }
    return _CHECKPOINT_PREFIX + canonical(content).encode()
