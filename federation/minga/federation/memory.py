"""How memory is used where much of it moves: in blocks, and from the C library's heap."""

import ctypes
from typing import Final

from minga.federation.limits import MIB

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

BLOCK_VALUES: Final = 1 << 16
"""Most values of a long vector that are worked on at a time. As float32 they take 256 KB and stay
in a core's second-level cache together with what is computed from them: the fastest block in a
sweep from 64 KB to 4 MB (masks, 2026-11-22)."""

KEPT_BYTES: Final = 4 * MIB
"""What stays with each heap when it is freed, for the next message."""

_NUM_HEAPS: Final = 2
"""glibc else gives each thread a heap of its own, up to eight a core, which all keep something."""


def keep_freed_memory() -> None:
    """Let glibc use freed memory again instead of giving it back to the kernel at once.

    A message of half a MiB is otherwise fetched from the kernel, page by page, and returned, each
    time that gRPC or protobuf copies it: more than half of what moving a blob costs (mallopt(3);
    measured with benchmarks/rounds.py). Memory above `KEPT_BYTES` still goes back. Other C
    libraries have no such setting, and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 4 * MIB)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(_M_ARENA_MAX, _NUM_HEAPS)
