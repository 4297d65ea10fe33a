"""Blobs: large content under its SHA-256, on the disk.

State, in one folder:

- `<64 hex digits>`: a complete blob. It appears in one step, synced, after its digest was checked.
- `parts/<sender>/<64 hex digits>.part`: an upload under way. Parts belong to their sender: nobody
  can spoil what another one is sending, nor learn what it holds.

File names are made from 32 raw bytes and a checked sender, never from a text that came over the
wire, so no name leads out of the folder.

Not here: who may send or read what (`coordinator.blob_service`), moving over a wire (`transfer`).
"""

import hashlib
import re
import threading
import time
from collections.abc import Callable, Collection, Generator
from pathlib import Path
from typing import BinaryIO, Final, Self

from minga.federation import durable
from minga.federation.chunks import Buffer
from minga.federation.errors import LimitError, MissingBlobError, PeerError
from minga.federation.limits import (
    CHUNK_BYTES,
    MAX_BLOB_BYTES,
    PART_LIFETIME_S,
    SENDER_MAX_BLOBS,
    SENDER_QUOTA_BYTES,
)
from minga.federation.part_file import PartFile

DIGEST_BYTES: Final = 32

_SENDER: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,127}")


class BlobStore:
    """The blobs of one coordinator; one process owns the folder.

    Methods may be called from several threads and block on the disk: a server calls those that
    move or hash much (`begin`, `Upload.append`, `Upload.finish`, `put_bytes`) in a thread.

    A sender's quota covers its uploads under way, with their announced sizes, and those of its
    blobs that are still here. Complete blobs of an earlier process count for nobody.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_blob_bytes: int = MAX_BLOB_BYTES,
        sender_quota_bytes: int = SENDER_QUOTA_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the store in a folder, made if missing.

        Args:
            folder: Where blobs and parts are.
            max_blob_bytes: Largest blob.
            sender_quota_bytes: What one sender may have here at a time.
            clock: Seconds since 1970, to tell abandoned parts by.
        """
        self._folder = folder
        self._parts = folder / "parts"
        self._parts.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._max_blob_bytes = max_blob_bytes
        self._sender_quota_bytes = sender_quota_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._uploads: dict[Path, Upload] = {}
        self._charges: dict[str, dict[bytes, int]] = {}  # sender -> digest -> bytes
        self._senders: dict[bytes, str] = {}  # complete blob -> whom it is charged to
        for temporary in folder.glob(".*.tmp"):
            temporary.unlink()  # left by a crash
        for part in self._parts.glob("*/*.part"):
            charges = self._charges.setdefault(part.parent.name, {})
            charges[bytes.fromhex(part.stem)] = part.stat().st_size

    # -- reading --

    def has(self, digest: bytes) -> bool:
        """Tell whether a blob is here, complete."""
        return self.path(digest).exists()

    def path(self, digest: bytes) -> Path:
        """Give the file that a complete blob has, or would have.

        Raises:
            PeerError: the digest does not have 32 bytes.
        """
        return self._folder / _hex(digest)

    def size(self, digest: bytes) -> int:
        """Give a blob's size in bytes.

        Raises:
            MissingBlobError: it is not here.
        """
        with self.open(digest) as file:
            return file.seek(0, 2)

    def open(self, digest: bytes) -> BinaryIO:
        """Open a blob for reading; it stays readable through the file even if it is deleted.

        Raises:
            MissingBlobError: it is not here.
        """
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError as error:
            raise MissingBlobError(
                f"there is no blob {_hex(digest)}; it was deleted, or never uploaded"
            ) from error

    def chunks(
        self, digest: bytes, *, offset: int = 0, chunk_bytes: int = CHUNK_BYTES
    ) -> Generator[bytes, None, None]:
        """Read a blob in pieces, from an offset on.

        Raises:
            MissingBlobError: it is not here.
        """
        with self.open(digest) as file:
            file.seek(offset)
            while chunk := file.read(chunk_bytes):
                yield chunk

    def read(self, digest: bytes) -> bytes:
        """Read a whole blob.

        Raises:
            MissingBlobError: it is not here.
        """
        with self.open(digest) as file:
            return file.read()

    # -- writing --

    def put_bytes(self, *pieces: durable.Piece) -> bytes:
        """Store own content, charged to nobody, and give its digest.

        Args:
            pieces: The content, one piece behind the other.

        Raises:
            LimitError: it is larger than a blob may be.
        """
        self._require_size(sum(memoryview(piece).nbytes for piece in pieces))
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        name = digest.digest()
        if not self.has(name):
            durable.replace_file(self.path(name), *pieces, mode=durable.PRIVATE)
        return name

    def offset(self, digest: bytes, sender: str) -> int:
        """Tell how many bytes of a sender's upload are here; all of them if it is complete."""
        for path in (self.path(digest), self._part_path(digest, sender)):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                continue
        return 0

    def begin(self, digest: bytes, *, size: int, sender: str) -> "Upload":
        """Start an upload, or go on with it; takes it over from an earlier link of the sender.

        Args:
            digest: SHA-256 of the content, 32 bytes.
            size: Bytes of the whole content.
            sender: Whose quota it counts for: lower case letters, digits and '-'.

        Raises:
            LimitError: the blob is too large, or the sender's quota is used up.
        """
        self._require_size(size)
        path = self._part_path(digest, sender)
        part = PartFile(path, digest=digest, size=size)
        with self._lock:
            self._charge(digest, size, sender)
            upload = Upload(self, sender, digest, part, former=self._uploads.get(path))
            self._uploads[path] = upload
        path.parent.mkdir(exist_ok=True, mode=0o700)
        upload.open()
        return upload

    def delete(self, digest: bytes) -> None:
        """Remove a blob, if it is here, and free its sender's quota."""
        self.path(digest).unlink(missing_ok=True)
        with self._lock:
            sender = self._senders.pop(digest, None)
            if sender is not None:
                self._discharge(digest, sender)

    def collect(
        self,
        keep: Collection[bytes],
        *,
        blob_grace_s: float = 0.0,
        part_lifetime_s: float = PART_LIFETIME_S,
    ) -> int:
        """Delete all blobs but some, and parts whose senders did not come back.

        Args:
            keep: Digests of the blobs to keep.
            blob_grace_s: Blobs that came within this time are kept too.
            part_lifetime_s: Parts that nothing was added to for this long are abandoned.

        Returns:
            How many blobs and parts were removed.
        """
        kept, before = set(keep), self._clock() - blob_grace_s
        here = [path for path in self._folder.iterdir() if _is_hex_digest(path.name)]
        unwanted = [
            digest
            for path in here
            if (digest := bytes.fromhex(path.name)) not in kept
            and (not blob_grace_s or path.stat().st_mtime < before)
        ]
        for digest in unwanted:
            self.delete(digest)
        return len(unwanted) + self._collect_parts(self._clock() - part_lifetime_s)

    def _collect_parts(self, before: float) -> int:
        abandoned = [
            part
            for part in self._parts.glob("*/*.part")
            if part not in self._uploads and part.stat().st_mtime < before
        ]
        for part in abandoned:
            part.unlink(missing_ok=True)
            with self._lock:
                self._discharge(bytes.fromhex(part.stem), part.parent.name)
        return len(abandoned)

    def _complete(self, digest: bytes, sender: str, part: PartFile) -> None:
        """Called by `Upload.finish`."""
        try:
            part.finish(self.path(digest))
        except PeerError:
            if not self._part_path(digest, sender).exists():
                with self._lock:
                    self._discharge(digest, sender)
            raise
        with self._lock:
            if self._senders.setdefault(digest, sender) != sender:
                self._discharge(digest, sender)  # another one sent the same content before

    def _leave(self, digest: bytes, sender: str, upload: "Upload") -> None:
        """Called by `Upload.close`."""
        path = self._part_path(digest, sender)
        with self._lock:
            if self._uploads.get(path) is upload:
                del self._uploads[path]

    def _require_size(self, size: int) -> None:
        if size > self._max_blob_bytes:
            raise LimitError(
                f"a blob of {size} bytes is over the limit of {self._max_blob_bytes}; "
                "send a smaller model or raise the limit"
            )

    def _charge(self, digest: bytes, size: int, sender: str) -> None:
        charges = self._charges.setdefault(sender, {})
        others = sum(charge for other, charge in charges.items() if other != digest)
        if others + size > self._sender_quota_bytes:
            raise LimitError(
                f"{sender} has {others} bytes here and may have {self._sender_quota_bytes}; "
                f"{size} more do not fit"
            )
        if digest not in charges and len(charges) >= SENDER_MAX_BLOBS:
            raise LimitError(f"{sender} has {len(charges)} blobs here, which is the most allowed")
        charges[digest] = size

    def _discharge(self, digest: bytes, sender: str) -> None:
        charges = self._charges.get(sender, {})
        charges.pop(digest, None)
        if not charges:
            self._charges.pop(sender, None)

    def _part_path(self, digest: bytes, sender: str) -> Path:
        if _SENDER.fullmatch(sender) is None:
            raise ValueError(f"sender {sender!r} may only have a-z, 0-9 and '-'")
        return self._parts / sender / f"{_hex(digest)}.part"


class Upload:
    """One blob on its way in. As a context manager it is closed at the end, complete or not."""

    def __init__(
        self,
        store: BlobStore,
        sender: str,
        digest: bytes,
        part: PartFile,
        former: "Upload | None",
    ) -> None:
        self._store = store
        self._sender = sender
        self._digest = digest
        self._part = part
        self._former = former

    def open(self) -> None:
        """Take the part from the former upload, if there is one, and go on with what is here.

        Raises:
            PeerError: a newer link took over.
        """
        self._close_former()
        self._part.open()

    @property
    def offset(self) -> int:
        """Bytes that are here."""
        return self._part.offset

    def append(self, offset: int, chunk: Buffer) -> None:
        """Add the next bytes.

        Raises:
            PeerError: the chunk does not belong at the end, or a newer link took over.
            LimitError: the blob would be longer than announced.
        """
        self._part.append(offset, chunk)

    def finish(self) -> None:
        """Check the digest and make the blob complete, durably.

        Raises:
            PeerError: bytes are missing, and the part stays; or the digest is wrong, and the part
                is removed.
        """
        self._store._complete(self._digest, self._sender, self._part)

    def close(self) -> None:
        """Leave the part for later, unless it is complete."""
        # Even one that was never opened stands between its follower and its former.
        self._close_former()
        self._part.close()
        self._store._leave(self._digest, self._sender, self)

    def _close_former(self) -> None:
        if self._former is not None:
            self._former.close()
            self._former = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hex(digest: bytes) -> str:
    if len(digest) != DIGEST_BYTES:
        raise PeerError(f"a blob's digest has {DIGEST_BYTES} bytes, got {len(digest)}")
    return digest.hex()


def _is_hex_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{64}", text) is not None
