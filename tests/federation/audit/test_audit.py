"""The chain and its signatures, attacked record by record."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.federation.audit import (
    AUDITOR,
    NOTHING,
    Checkpoint,
    Entry,
    Record,
    Report,
    format_time,
    from_line,
    parse_time,
    require_extension,
    to_line,
    verify,
)
from minga.federation.coordinator.authority import Authority
from minga.federation.errors import AuditError
from minga.federation.identity import Identity, Role, make_csr, new_key, utc_now

NUM_ENTRIES = 12
SIGNED = (5, 10, 12)


def auditor_of(authority: Authority, role: Role = Role.SERVICE, name: str = AUDITOR) -> Identity:
    """Give an identity that signs checkpoints, or one that should not."""
    key = new_key()
    certificate = authority.issue_client(role, name, make_csr(key, name))
    return Identity.of(key, certificate, authority.certificate)


def chain(
    signer: Identity, num_entries: int = NUM_ENTRIES, signed: tuple[int, ...] = SIGNED
) -> list[Record]:
    """Give a log of some entries, signed at some of them."""
    records: list[Record] = []
    sequence, previous, checkpoint = 0, NOTHING, 0
    now = utc_now()
    for index in range(num_entries):
        entry = Entry.following(
            sequence,
            previous,
            time=now + timedelta(seconds=index),
            kind="device-enrolled",
            subject=f"device/press-{index}",
            details={"group": "line-3", "naïve": index % 2 == 0, "count": index},
        )
        records.append(entry)
        sequence, previous = entry.sequence, entry.hash
        if sequence in signed:
            records.append(
                Checkpoint.signed(
                    signer, sequence=sequence, digest=previous, time=now, previous=checkpoint
                )
            )
            checkpoint = sequence
    return records


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The federation's authority."""
    return Authority.open(tmp_path_factory.mktemp("audit") / "authority")


@pytest.fixture(scope="module")
def signer(authority: Authority) -> Identity:
    """The identity that signs checkpoints."""
    return auditor_of(authority)


@pytest.fixture(scope="module")
def log(signer: Identity) -> list[Record]:
    """A log that is whole and signed to its end."""
    return chain(signer)


@pytest.fixture(scope="module")
def lines(log: list[Record]) -> list[str]:
    """The same as an export has it."""
    return [to_line(record) for record in log]


def verify_lines(lines: list[str], authority: x509.Certificate) -> Report:
    """Verify what an export's lines say."""
    return verify((from_line(line) for line in lines), authority)


def test_a_whole_log_verifies(log: list[Record], authority: Authority) -> None:
    """The report says how much there is, how much of it is signed, and the last hash to keep."""
    report = verify(log, authority.certificate)
    assert (report.num_entries, report.num_checkpoints, report.signed_until) == (12, 3, 12)
    assert report.last_hash == log[-1].hash


def test_records_survive_their_lines(log: list[Record], lines: list[str]) -> None:
    """Reading a line gives what was written; lines are ASCII and sort their keys."""
    assert [from_line(line) for line in lines] == log
    assert all(line.isascii() for line in lines)
    assert list(json.loads(lines[0])) == sorted(json.loads(lines[0]))


def test_the_hash_is_what_the_documentation_says(log: list[Record]) -> None:
    """Computed once more from the description of the format alone."""
    content = json.loads(to_line(log[1]))
    expected = content.pop("hash")
    del content["type"]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    prefix = b"minga.federation.v1/audit-entry\x00"
    assert hashlib.sha256(prefix + text.encode()).hexdigest() == expected


def test_the_signature_is_what_the_documentation_says(log: list[Record]) -> None:
    """Checked once more from the description of the format alone."""
    content = json.loads(next(to_line(r) for r in log if isinstance(r, Checkpoint)))
    signed = ("hash", "previous_checkpoint", "sequence", "time")
    text = json.dumps(
        {name: content[name] for name in signed}, sort_keys=True, separators=(",", ":")
    )
    message = b"minga.federation.v1/identity-signature\x00minga.federation.v1/audit-checkpoint\x00"
    certificate = x509.load_der_x509_certificate(base64.b64decode(content["certificate"]))
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    signature = base64.b64decode(content["signature"])
    key.verify(signature, message + text.encode(), ec.ECDSA(hashes.SHA256()))


# -- attacks on the text ----------------------------------------------------------------------


@settings(max_examples=400)
@given(data=st.data())
def test_any_changed_character_is_found(
    lines: list[str], authority: Authority, data: st.DataObject
) -> None:
    """Replaced, dropped, doubled, in any line, of entries and of checkpoints alike."""
    index = data.draw(st.integers(0, len(lines) - 1))
    line = lines[index]
    place = data.draw(st.integers(0, len(line) - 1))
    other = data.draw(st.characters(exclude_characters=line[place]))
    change = data.draw(st.sampled_from(["replace", "drop", "double"]))
    changed = {
        "replace": line[:place] + other + line[place + 1 :],
        "drop": line[:place] + line[place + 1 :],
        "double": line[:place] + line[place] + line[place:],
    }[change]
    with pytest.raises(AuditError):
        verify_lines([*lines[:index], changed, *lines[index + 1 :]], authority.certificate)


@given(data=st.data())
@settings(max_examples=200)
def test_any_removed_line_is_found(
    lines: list[str], authority: Authority, data: st.DataObject
) -> None:
    """Also several at once, as long as a later record is left."""
    last = len(lines) - 1
    removed = data.draw(st.sets(st.integers(0, last - 1), min_size=1))
    left = [line for index, line in enumerate(lines) if index not in removed]
    with pytest.raises(AuditError):
        verify_lines(left, authority.certificate)


@given(data=st.data())
@settings(max_examples=200)
def test_any_swap_is_found(lines: list[str], authority: Authority, data: st.DataObject) -> None:
    """Of any two records, wherever they are; so is every other order."""
    order = data.draw(st.permutations(range(len(lines))))
    if order == list(range(len(lines))):
        return
    with pytest.raises(AuditError):
        verify_lines([lines[index] for index in order], authority.certificate)


@given(data=st.data())
@settings(max_examples=100)
def test_any_doubled_line_is_found(
    lines: list[str], authority: Authority, data: st.DataObject
) -> None:
    """A record that is there twice, anywhere."""
    copied = data.draw(st.integers(0, len(lines) - 1))
    place = data.draw(st.integers(0, len(lines)))
    with pytest.raises(AuditError):
        verify_lines([*lines[:place], lines[copied], *lines[place:]], authority.certificate)


@given(text=st.text(max_size=200))
def test_what_is_no_record_is_told(text: str) -> None:
    """Whatever the line holds, the error is ours."""
    with pytest.raises(AuditError, match="no record of an audit log"):
        from_line(text)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"type": "entry"}', '{"type": []}', "NaN", "{}"])
def test_odd_json_is_told(text: str) -> None:
    """Deeply nested, incomplete, or of another type."""
    with pytest.raises(AuditError, match="no record of an audit log"):
        from_line(text)


@pytest.mark.parametrize("index", [0, 5])
@pytest.mark.parametrize("name", ["sequence", "time", "hash", "details", "previous_checkpoint"])
@pytest.mark.parametrize("value", ["1", 1.5, True, None, [], {}, -1, 10**30])
def test_fields_of_other_types_are_told(
    lines: list[str], authority: Authority, index: int, name: str, value: object
) -> None:
    """A line that is canonical may still hold anything in its fields."""
    content = json.loads(lines[index])
    if name not in content:
        return
    content[name] = value
    changed = json.dumps(content, sort_keys=True, separators=(",", ":"))
    with pytest.raises(AuditError):
        verify_lines([*lines[:index], changed, *lines[index + 1 :]], authority.certificate)


# -- attacks by somebody who computes hashes --------------------------------------------------


def rehashed(records: list[Record], index: int, subject: str) -> list[Record]:
    """Change an entry and compute every hash behind it anew, as anybody can."""
    changed: list[Record] = list(records[:index])
    previous = NOTHING
    for record in reversed(changed):
        if isinstance(record, Entry):
            previous = record.hash
            break
    for position, record in enumerate(records[index:]):
        if isinstance(record, Checkpoint):
            changed.append(record)
            continue
        entry = Entry.following(
            record.sequence - 1,
            previous,
            time=parse_time(record.time),
            kind=record.kind,
            subject=subject if position == 0 else record.subject,
            details=record.details,
        )
        changed.append(entry)
        previous = entry.hash
    return changed


@pytest.mark.parametrize("index", range(13))
def test_new_hashes_do_not_fit_the_signatures(
    log: list[Record], authority: Authority, index: int
) -> None:
    """Whoever lacks the key cannot rewrite what was signed, even with every hash made anew."""
    if isinstance(log[index], Checkpoint):
        return
    with pytest.raises(AuditError, match="history was rewritten"):
        verify(rehashed(log, index, "device/mallory"), authority.certificate)


def test_the_unsigned_end_can_be_rewritten(signer: Identity, authority: Authority) -> None:
    """What is not signed yet is only as safe as the file; the report says where that begins."""
    records = chain(signer, signed=(5,))
    report = verify(rehashed(records, 9, "device/mallory"), authority.certificate)
    assert report.signed_until == 5


def test_a_cut_before_a_checkpoint_is_found(log: list[Record], authority: Authority) -> None:
    """Entries are gone that a checkpoint which is left has signed."""
    entries = [record for record in log if isinstance(record, Entry)]
    with pytest.raises(AuditError, match="its end was cut off"):
        verify([*entries[:10], log[-1]], authority.certificate)


def test_a_cut_with_its_checkpoints_needs_a_copy(log: list[Record], authority: Authority) -> None:
    """A log that was cut back verifies; the copy that was kept elsewhere shows what is gone."""
    cut = log[:6]
    assert verify(cut, authority.certificate).num_entries == 5
    with pytest.raises(AuditError, match="the copy has entry 6, the log ends before it"):
        require_extension(cut, log)
    require_extension(log, cut)


def test_a_rewriter_with_the_key_needs_a_copy(
    log: list[Record], signer: Identity, authority: Authority
) -> None:
    """Another history with good signatures is told by the copy alone."""
    other = chain(signer)
    verify(other, authority.certificate)
    with pytest.raises(AuditError, match="entry 1 is another one than in the copy"):
        require_extension(other, log)


def test_an_empty_log_is_no_log(authority: Authority) -> None:
    """Removing everything is a removal."""
    with pytest.raises(AuditError, match="empty"):
        verify([], authority.certificate)


# -- who signs --------------------------------------------------------------------------------


Forge = Callable[[Authority, Path], Identity]


@pytest.mark.parametrize(
    "forge",
    [
        lambda authority, folder: auditor_of(Authority.open(folder)),
        lambda authority, folder: auditor_of(authority, Role.DEVICE),
        lambda authority, folder: auditor_of(authority, Role.OPERATOR),
        lambda authority, folder: auditor_of(authority, Role.SERVICE, "other"),
    ],
    ids=["foreign", "device", "operator", "other-service"],
)
def test_only_the_audit_key_signs(authority: Authority, tmp_path: Path, forge: Forge) -> None:
    """Not another authority's, not a device's or operator's, though they are of the federation."""
    with pytest.raises(AuditError, match="checkpoint of entry 5 is not valid"):
        verify(chain(forge(authority, tmp_path)), authority.certificate)


def test_old_checkpoints_hold(authority: Authority) -> None:
    """A certificate counts as it was when it signed: logs outlive certificates by years."""
    past = utc_now() - timedelta(days=400)
    then = Authority(certificate=authority.certificate, key=authority.key, clock=lambda: past)
    signer = auditor_of(then)
    entry = Entry.following(0, NOTHING, time=past, kind="a", subject="b", details={})
    checkpoint = Checkpoint.signed(signer, sequence=1, digest=entry.hash, time=past, previous=0)
    assert verify([entry, checkpoint], authority.certificate).signed_until == 1
    late = Checkpoint.signed(signer, sequence=1, digest=entry.hash, time=utc_now(), previous=0)
    with pytest.raises(AuditError, match="expired"):
        verify([entry, late], authority.certificate)


def test_a_moved_signature_does_not_fit(log: list[Record], authority: Authority) -> None:
    """A checkpoint says which entry it signs, and when, and the one before it."""
    place = next(i for i, record in enumerate(log) if isinstance(record, Checkpoint))
    checkpoint = log[place]
    assert isinstance(checkpoint, Checkpoint)
    for forged in (
        replace(checkpoint, time=format_time(datetime(2026, 1, 1, tzinfo=UTC))),
        replace(checkpoint, time="yesterday"),
        replace(checkpoint, time="2026-01-01T00:00:00.000000"),
        replace(checkpoint, signature=b""),
        replace(checkpoint, certificate=b""),
    ):
        with pytest.raises(AuditError, match="is not valid"):
            verify([*log[:place], forged, *log[place + 1 :]], authority.certificate)
