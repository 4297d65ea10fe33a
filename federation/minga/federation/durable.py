"""Files that are either wholly there or not there at all, whatever crashes.

A file is written under a temporary name in the same folder, synced, and given its name in one
step; then the folder is synced, or the name itself could be lost with the power.
"""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

Piece = bytes | memoryview
"""Bytes that are written as they are."""

PRIVATE = 0o600
"""Mode of a file that only its owner may read."""

PUBLIC = 0o644
"""Mode of a file that anybody on the machine may read."""


def replace_file(path: Path, *pieces: Piece, mode: int = PUBLIC) -> None:
    """Write a file, or put new content in its place, in one step.

    Args:
        path: Where it goes.
        pieces: The content, one piece behind the other.
        mode: Who may read it.
    """
    temporary = _write_beside(path, pieces, mode)
    try:
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def replacing(path: Path, *, durably: bool = False) -> Iterator[Path]:
    """Give a name to write a file under, which takes the place of `path` when the block ends well.

    For those who write files by name, or often. Only one process may write `path` at a time; what
    a killed one left half written is overwritten by the next.

    Args:
        path: Where it goes.
        durably: Also over a power cut, which costs some milliseconds.
    """
    unfinished = path.with_name(f"{path.name}.new")
    yield unfinished
    if durably:
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
    unfinished.replace(path)


def create_file(path: Path, data: bytes, *, mode: int = PUBLIC) -> None:
    """Write a file that must not exist yet, in one step.

    A hard link, unlike a rename, fails if the name is taken: of two processes that create the
    same file one wins and the other one learns it.

    Raises:
        FileExistsError: the file exists.
    """
    temporary = _write_beside(path, (data,), mode)
    try:
        path.hardlink_to(temporary)
    finally:
        temporary.unlink()
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_beside(path: Path, pieces: Iterable[Piece], mode: int) -> Path:
    """Write and sync a temporary file next to `path`.

    The mode is given when the file is made, so that a secret is never readable in between, and
    set again afterwards, because the process's umask may have taken bits away.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
