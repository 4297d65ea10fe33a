"""The blob store: resumable uploads, limits, quotas, and what crashes leave."""

import hashlib
import os
import tracemalloc
from pathlib import Path
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minga.federation.blobs import BlobStore
from minga.federation.errors import LimitError, MissingBlobError, PeerError

SENDER = "device-press-7"


def digest_of(data: bytes) -> bytes:
    """Name content."""
    return hashlib.sha256(data).digest()


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """A store that takes blobs of 1,000 bytes and 2,500 bytes from each sender."""
    return BlobStore(tmp_path / "blobs", max_blob_bytes=1000, sender_quota_bytes=2500)


def put(store: BlobStore, data: bytes, sender: str = SENDER) -> bytes:
    """Upload content at once."""
    digest = digest_of(data)
    with store.begin(digest, size=len(data), sender=sender) as upload:
        upload.append(0, data)
        upload.finish()
    return digest


# -- the plain ways ---------------------------------------------------------------------------


def test_own_content_reads_back(store: BlobStore) -> None:
    """By its digest, whole, in pieces, from an offset, and as a file."""
    digest = store.put_bytes(b"0123456789")
    assert digest == digest_of(b"0123456789")
    assert store.put_bytes(b"0123456789") == digest
    assert store.has(digest)
    assert store.size(digest) == 10
    assert store.read(digest) == b"0123456789"
    assert list(store.chunks(digest, offset=3, chunk_bytes=4)) == [b"3456", b"789"]
    with store.open(digest) as file:
        assert file.read(2) == b"01"
    assert store.path(digest).name == digest.hex()


def test_a_blob_that_is_not_there_is_told(store: BlobStore) -> None:
    """By every way of reading."""
    digest = digest_of(b"never")
    assert not store.has(digest)
    for read in (store.open, store.read, store.size, lambda d: list(store.chunks(d))):
        with pytest.raises(MissingBlobError, match=digest.hex()):
            read(digest)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(data=st.binary(max_size=1000), cuts=st.lists(st.integers(0, 1000), max_size=6))
def test_any_cutting_gives_the_same_blob(store: BlobStore, data: bytes, cuts: list[int]) -> None:
    """Each piece over a link of its own, in any sizes, empty content too."""
    digest = digest_of(data)
    store.delete(digest)
    for end in sorted({min(cut, len(data)) for cut in cuts}):
        with store.begin(digest, size=len(data), sender=SENDER) as upload:
            upload.append(upload.offset, data[upload.offset : end])
        assert store.offset(digest, SENDER) == end
        assert not store.has(digest)
    with store.begin(digest, size=len(data), sender=SENDER) as upload:
        upload.append(upload.offset, data[upload.offset :])
        upload.finish()
    assert store.read(digest) == data
    assert store.offset(digest, SENDER) == len(data)


def test_memory_is_flat(tmp_path: Path) -> None:
    """A 64 MiB blob goes in, is resumed and comes out within 4 MiB of memory."""
    store = BlobStore(tmp_path)
    piece = os.urandom(2**20)
    digest = hashlib.sha256(piece * 64).digest()
    tracemalloc.start()
    for end in (40, 64):
        with store.begin(digest, size=64 * 2**20, sender=SENDER) as upload:
            while upload.offset < end * 2**20:
                upload.append(upload.offset, piece)
            if end == 64:
                upload.finish()
    assert sum(len(chunk) for chunk in store.chunks(digest)) == 64 * 2**20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


# -- bad senders ------------------------------------------------------------------------------


def test_tampered_content_is_refused_and_forgotten(store: BlobStore) -> None:
    """The digest decides, nothing stays, and the sender may send the right content."""
    digest = digest_of(b"right")
    with store.begin(digest, size=5, sender=SENDER) as upload:
        upload.append(0, b"wrong")
        with pytest.raises(PeerError, match=f"announced was {digest.hex()}"):
            upload.finish()
    assert not store.has(digest)
    assert store.offset(digest, SENDER) == 0
    assert put(store, b"right") == digest


def test_a_chunk_for_elsewhere_is_refused(store: BlobStore) -> None:
    """A gap, an overlap, and one that goes beyond the announced size; the part stays good."""
    digest = digest_of(b"0123456789")
    with store.begin(digest, size=10, sender=SENDER) as upload:
        upload.append(0, b"01234")
        for offset in (0, 4, 6):
            with pytest.raises(PeerError, match=f"offset {offset} came, expected 5"):
                upload.append(offset, b"x")
        with pytest.raises(LimitError, match="announced with 10 bytes"):
            upload.append(5, b"567890")
        with pytest.raises(PeerError, match="after 5 of 10 bytes"):
            upload.finish()
        upload.append(5, b"56789")
        upload.finish()
    assert store.read(digest) == b"0123456789"


def test_an_oversize_blob_is_refused_before_it_is_sent(store: BlobStore) -> None:
    """Announced by a sender, or our own."""
    with pytest.raises(LimitError, match="1001 bytes is over the limit of 1000"):
        store.begin(digest_of(b""), size=1001, sender=SENDER)
    with pytest.raises(LimitError):
        store.put_bytes(b"x" * 1001)


def test_a_quota_covers_what_a_sender_has_here(store: BlobStore) -> None:
    """Complete, unfinished and announced bytes count; deleted ones no more; others do not mind."""
    first = put(store, b"a" * 1000)
    part = digest_of(b"b" * 1000)
    with store.begin(part, size=1000, sender=SENDER) as upload:
        upload.append(0, b"b")
    with pytest.raises(LimitError, match="has 2000 bytes here and may have 2500"):
        store.begin(digest_of(b"c" * 501), size=501, sender=SENDER)
    put(store, b"c" * 501, sender="device-press-8")
    with store.begin(part, size=1000, sender=SENDER):
        pass  # to go on is not to count twice
    store.delete(first)
    put(store, b"d" * 501)


def test_a_quota_covers_the_number_of_blobs(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a sender could fill the disk's table of files with empty announcements."""
    monkeypatch.setattr("minga.federation.blobs.SENDER_MAX_BLOBS", 3)
    for number in range(3):
        store.begin(bytes([number]) * 32, size=1, sender=SENDER).close()
    with pytest.raises(LimitError, match="has 3 blobs here"):
        store.begin(b"x" * 32, size=1, sender=SENDER)


def test_senders_do_not_share_parts(store: BlobStore) -> None:
    """What one has begun with garbage does not spoil what another one sends."""
    digest = digest_of(b"content")
    with store.begin(digest, size=7, sender="device-mallory") as upload:
        upload.append(0, b"garbag")
    assert store.offset(digest, SENDER) == 0
    put(store, b"content")
    with store.begin(digest, size=7, sender="device-mallory") as upload:
        upload.append(6, b"e")
        with pytest.raises(PeerError, match="announced was"):
            upload.finish()
    assert store.read(digest) == b"content"


@pytest.mark.parametrize("digest", [b"", b"../../etc/passwd", b"x" * 31, b"x" * 33, b"/" * 64])
def test_a_digest_has_32_bytes(store: BlobStore, digest: bytes) -> None:
    """File names are made from bytes: no text of a sender's reaches the file system."""
    with pytest.raises(PeerError, match="32 bytes"):
        store.begin(digest, size=1, sender=SENDER)
    for method in (store.has, store.read, store.path, store.delete):
        with pytest.raises(PeerError, match="32 bytes"):
            method(digest)


@pytest.mark.parametrize("sender", ["", "..", "a/b", "../a", "A", "a\n", "/etc", "a" * 129])
def test_a_sender_has_no_path(store: BlobStore, sender: str) -> None:
    """Senders are named by the service from checked certificates; anything else is our mistake."""
    with pytest.raises(ValueError, match="sender"):
        store.begin(digest_of(b""), size=0, sender=sender)


# -- links and crashes ------------------------------------------------------------------------


def test_a_newer_link_takes_the_upload_over(store: BlobStore) -> None:
    """The old link's late chunks are refused instead of mixed in."""
    digest = digest_of(b"0123456789")
    old = store.begin(digest, size=10, sender=SENDER)
    old.append(0, b"01234")
    with store.begin(digest, size=10, sender=SENDER) as new:
        assert new.offset == 5
        with pytest.raises(PeerError, match="newer upload"):
            old.append(5, b"xxxxx")
        old.close()
        new.append(5, b"56789")
        new.finish()
    assert store.read(digest) == b"0123456789"


def test_many_links_at_once_leave_one_good_blob(store: BlobStore) -> None:
    """Threads resume the same upload at the same time; whoever loses is refused, nothing mixes."""
    data = os.urandom(1000)
    digest = digest_of(data)

    def send() -> None:
        while not store.has(digest):
            try:
                with store.begin(digest, size=1000, sender=SENDER) as upload:
                    while upload.offset < 1000:
                        upload.append(upload.offset, data[upload.offset : upload.offset + 100])
                    upload.finish()
            except PeerError:
                continue

    threads = [Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read(digest) == data


def test_a_part_survives_a_restart(store: BlobStore, tmp_path: Path) -> None:
    """The next process goes on with it, and it counts for the quota."""
    data = b"z" * 1000
    upload = store.begin(digest_of(data), size=1000, sender=SENDER)
    upload.append(0, data[:600])
    again = BlobStore(tmp_path / "blobs", max_blob_bytes=1000, sender_quota_bytes=1000)
    assert again.offset(digest_of(data), SENDER) == 600
    with pytest.raises(LimitError):
        again.begin(digest_of(b"other"), size=500, sender=SENDER)
    with again.begin(digest_of(data), size=1000, sender=SENDER) as resumed:
        resumed.append(600, data[600:])
        resumed.finish()
    assert again.read(digest_of(data)) == data


def test_a_part_that_a_crash_damaged_is_found_out(store: BlobStore, tmp_path: Path) -> None:
    """Zeros where pages never reached the disk: the digest fails and the part is removed."""
    data = b"z" * 1000
    with store.begin(digest_of(data), size=1000, sender=SENDER) as upload:
        upload.append(0, data[:600])
    part = next((tmp_path / "blobs" / "parts" / SENDER).iterdir())
    part.write_bytes(b"\0" * 600)
    again = BlobStore(tmp_path / "blobs")
    with again.begin(digest_of(data), size=1000, sender=SENDER) as upload:
        upload.append(600, data[600:])
        with pytest.raises(PeerError, match="from the start"):
            upload.finish()
    assert again.offset(digest_of(data), SENDER) == 0


def test_a_part_longer_than_announced_begins_anew(store: BlobStore) -> None:
    """The sender announced another size before."""
    digest = digest_of(b"abc")
    with store.begin(digest, size=9, sender=SENDER) as upload:
        upload.append(0, b"abcdefgh")
    put(store, b"abc")
    assert store.read(digest) == b"abc"


def test_temporary_files_of_a_crash_are_removed(store: BlobStore, tmp_path: Path) -> None:
    """When the next process opens the store."""
    left = tmp_path / "blobs" / f".{'0' * 64}.1234.tmp"
    left.write_bytes(b"half")
    BlobStore(tmp_path / "blobs")
    assert not left.exists()


# -- removing ---------------------------------------------------------------------------------


def test_collecting_keeps_what_is_wanted(store: BlobStore) -> None:
    """Complete blobs by digest; deleting twice is no error."""
    kept, dropped = store.put_bytes(b"kept"), store.put_bytes(b"dropped")
    assert store.collect([kept]) == 1
    assert store.has(kept)
    assert not store.has(dropped)
    store.delete(dropped)
    assert store.collect([kept]) == 0


def test_collecting_removes_abandoned_parts(tmp_path: Path) -> None:
    """Those nothing came for in a day, unless a link is open; the quota is free again."""
    now = [0.0]
    store = BlobStore(tmp_path, sender_quota_bytes=100, clock=lambda: now[0])
    open_upload = store.begin(digest_of(b"open"), size=50, sender=SENDER)
    store.begin(digest_of(b"left"), size=50, sender=SENDER).close()
    parts = list((tmp_path / "parts" / SENDER).iterdir())
    for part in parts:
        os.utime(part, (1000.0, 1000.0))
    now[0] = 1000.0 + 23 * 3600
    assert store.collect([]) == 0
    now[0] = 1000.0 + 25 * 3600
    assert store.collect([]) == 1
    assert store.begin(digest_of(b"next"), size=50, sender=SENDER).offset == 0
    open_upload.append(0, b"open")


def test_a_reader_keeps_what_is_deleted(store: BlobStore) -> None:
    """Whoever has it open reads on to the end."""
    digest = store.put_bytes(b"0123456789")
    chunks = store.chunks(digest, chunk_bytes=5)
    assert next(chunks) == b"01234"
    store.delete(digest)
    assert next(chunks) == b"56789"
