"""A blob that is still arriving: a file that grows in order and is named when its digest fits.

What is on the disk after a crash may be damaged (pages that never got there read as zeros). It is
not looked at until the end: the digest over everything decides, and a part that fails is removed.
"""

import hashlib
import os
import threading
from io import FileIO
from pathlib import Path
from typing import Final

from minga.federation import durable
from minga.federation.chunks import Buffer
from minga.federation.errors import LimitError, PeerError
from minga.federation.limits import MIB

_HASH_PIECE_BYTES: Final = MIB


class PartFile:
    """One blob's part. Memory stays flat, whatever the size.

    It is used once: made, opened, closed. Methods may be called from several threads. `close` may
    come at any time, even before `open`, and everything after it is refused: that is how whoever
    resumes a part takes it from its former writer.
    """

    def __init__(self, path: Path, *, digest: bytes, size: int) -> None:
        """Describe a part; nothing is read or written yet.

        Args:
            path: The part's file.
            digest: SHA-256 of the whole blob, 32 bytes.
            size: Bytes of the whole blob.
        """
        self._path = path
        self._digest = digest
        self._size = size
        self._lock = threading.Lock()
        self._hash = hashlib.sha256()
        self._file: FileIO | None = None
        self._offset = 0
        self._is_closed = False

    def open(self) -> None:
        """Open the part, or make it; reads what is there once, to hash it. Again it does nothing.

        Raises:
            PeerError: another upload took the part over.
        """
        with self._lock:
            self._require_not_closed()
            if self._file is not None:
                return
            # Unbuffered: what `append` returned from is with the kernel and survives this process.
            self._file = self._path.open("a+b", buffering=0)
            self._file.seek(0)
            while piece := self._file.read(_HASH_PIECE_BYTES):
                self._hash.update(piece)
            self._offset = self._file.tell()
            if self._offset > self._size:  # left by an announcement of another size: begin anew
                self._file.truncate(0)
                self._hash = hashlib.sha256()
                self._offset = 0

    @property
    def offset(self) -> int:
        """Bytes that are there."""
        return self._offset

    def append(self, offset: int, chunk: Buffer) -> None:
        """Add the next bytes.

        Args:
            offset: Where the chunk belongs; only the end of the part is taken.
            chunk: The bytes.

        Raises:
            PeerError: the chunk belongs elsewhere, or another upload took the part over.
            LimitError: the blob would be longer than announced.
        """
        with self._lock:
            file = self._require_open()
            if offset != self._offset:
                raise PeerError(f"a chunk for offset {offset} came, expected {self._offset}")
            if offset + len(chunk) > self._size:
                raise LimitError(
                    f"the blob was announced with {self._size} bytes and is longer; "
                    "announce its true size"
                )
            view = memoryview(chunk)
            while view:
                view = view[file.write(view) :]
            self._hash.update(chunk)
            self._offset += len(chunk)

    def finish(self, target: Path, *, is_durable: bool = True) -> None:
        """Give the complete blob its name, durably unless nobody needs it after a loss of power.

        Raises:
            PeerError: bytes are missing, and the part stays; or the digest is wrong, and the part
                is removed.
        """
        with self._lock:
            file = self._require_open()
            if self._offset != self._size:
                raise PeerError(
                    f"the blob ended after {self._offset} of {self._size} bytes; send the rest"
                )
            if self._hash.digest() != self._digest:
                self._close()
                self._path.unlink()
                raise PeerError(
                    f"the content's digest is {self._hash.hexdigest()}, "
                    f"announced was {self._digest.hex()}; send it again from the start"
                )
            if is_durable:
                os.fsync(file.fileno())
            self._path.replace(target)
            if is_durable:
                durable.sync_folder(target.parent)
            self._close()

    def close(self) -> None:
        """Leave the part as it is, for later."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        self._is_closed = True
        if self._file is not None:
            self._file.close()

    def _require_open(self) -> FileIO:
        self._require_not_closed()
        assert self._file is not None, "open comes first"
        return self._file

    def _require_not_closed(self) -> None:
        if self._is_closed:
            raise PeerError("a newer upload of the same blob took over")
