"""Chunks of blobs as Zstandard frames (RFC 8878), for links that are slower than a processor.

Each chunk is a frame of its own, so a transfer resumes at any chunk, and offsets, sizes and digests
stay those of the content. Whoever unpacks a frame allots no more than a chunk, whatever it says.
"""

from typing import Final

import zstandard

from minga.federation.chunks import Buffer
from minga.federation.errors import PeerError
from minga.federation.limits import CHUNK_BYTES

LEVEL: Final = 3
"""Zstandard's own default: beyond it float32 weights hardly get smaller."""

WORTHWHILE: Final = 0.95
"""A chunk that does not shrink to this share is not worth unpacking."""


class Packer:
    """Packs the chunks of one blob, until one of them does not get smaller.

    Masked updates are random bits: they cost one try.
    """

    def __init__(self) -> None:
        self._compressor: zstandard.ZstdCompressor | None = zstandard.ZstdCompressor(level=LEVEL)

    def pack(self, chunk: Buffer) -> bytes | None:
        """Give a chunk as a frame; None if it should go as it is."""
        if self._compressor is None or not chunk:
            return None
        frame = self._compressor.compress(chunk)
        if len(frame) > WORTHWHILE * len(chunk):
            self._compressor = None
            return None
        return frame


def unpack(frame: Buffer) -> bytes:
    """Give back a chunk.

    Raises:
        PeerError: it is no Zstandard frame, holds more than a chunk, or does not say how much.
    """
    try:
        size = zstandard.frame_content_size(frame)
        if not 0 <= size <= CHUNK_BYTES:
            raise PeerError(
                f"a packed chunk holds {size} bytes (-1: unknown); at most {CHUNK_BYTES} are taken"
            )
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=CHUNK_BYTES)
    except zstandard.ZstdError as error:
        raise PeerError(f"a packed chunk is no Zstandard frame: {error}") from error
