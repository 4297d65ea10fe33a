"""The messages that carry a blob's chunks, written and read around one copy of their content.

protobuf copies a chunk when a message is made of it, when that is written (into a buffer that it
enlarges on the way, and from there), when it is read, and each time that somebody looks at it. All
of a blob's bytes pass here, so these two messages are written by hand, and read where they came in.
The bytes on the wire are protobuf's own. What is not just a chunk is left to protobuf.
"""

from dataclasses import dataclass
from typing import Final, TypeAlias

from google.protobuf.message import Message

from minga.federation.v1 import federation_pb2 as pb

Buffer: TypeAlias = bytes | memoryview

_BYTES: Final = 2
"""The wire type of bytes: https://protobuf.dev/programming-guides/encoding/."""


def _tag(number: int, wire_type: int) -> bytes:
    return bytes([number << 3 | wire_type])


_UPLOAD: Final = {
    False: _tag(pb.UploadRequest.CHUNK_FIELD_NUMBER, _BYTES),
    True: _tag(pb.UploadRequest.ZSTD_CHUNK_FIELD_NUMBER, _BYTES),
}
_DOWNLOAD: Final = _tag(pb.DownloadResponse.CHUNK_FIELD_NUMBER, _BYTES)


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one message carries of a blob."""

    content: Buffer
    is_packed: bool = False
    """Whether it is a Zstandard frame."""
    size: int = 0
    """Of the whole blob; in downloads alone."""


def serialize(message: Message | bytes) -> bytes:
    """Give the bytes of a message; one of a chunk is bytes already."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def upload_request(content: Buffer, *, is_packed: bool = False) -> bytes:
    """Give the bytes of an `UploadRequest` that carries a chunk, which is not empty."""
    return b"".join((_UPLOAD[is_packed], _varint(len(content)), content))


def download_response(content: Buffer, size: int, *, is_packed: bool = False) -> bytes:
    """Give the bytes of a `DownloadResponse`.

    Args:
        content: The chunk, or its frame; empty for an empty rest.
        size: Of the whole blob, in bytes.
        is_packed: Whether it is a frame.
    """
    if is_packed:
        return pb.DownloadResponse(zstd_chunk=bytes(content), size=size).SerializeToString()
    rest = pb.DownloadResponse(size=size).SerializeToString()
    return b"".join((_DOWNLOAD, _varint(len(content)), content, rest)) if content else rest


def read_upload(data: bytes) -> Chunk | pb.UploadRequest:
    """Read an `UploadRequest`: a chunk, or a message with a header or with nothing.

    Raises:
        DecodeError: the bytes are no such message.
    """
    for is_packed, tag in _UPLOAD.items():
        if data.startswith(tag):
            start, stop = _span(data)
            if start < stop == len(data):
                return Chunk(memoryview(data)[start:stop], is_packed)
    message = pb.UploadRequest.FromString(data)
    match message.WhichOneof("part"):
        case "chunk" if message.chunk:
            return Chunk(message.chunk)
        case "zstd_chunk" if message.zstd_chunk:
            return Chunk(message.zstd_chunk, is_packed=True)
    return message


def read_download(data: bytes) -> Chunk:
    """Read a `DownloadResponse`.

    Raises:
        DecodeError: the bytes are no such message.
    """
    if data.startswith(_DOWNLOAD):
        start, stop = _span(data)
        if start < stop <= len(data):
            size = pb.DownloadResponse.FromString(data[stop:]).size
            if data[stop:] == pb.DownloadResponse(size=size).SerializeToString():
                return Chunk(memoryview(data)[start:stop], size=size)
    message = pb.DownloadResponse.FromString(data)
    if message.zstd_chunk:
        return Chunk(message.zstd_chunk, is_packed=True, size=message.size)
    return Chunk(message.chunk, size=message.size)


def _varint(number: int) -> bytes:
    """Write a number in groups of seven bits, the lowest first."""
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def _span(data: bytes) -> tuple[int, int]:
    """Say where the first field's content begins and ends; (0, 0) if its length is none."""
    length = 0
    for place, group in enumerate(data[1:6]):
        length |= (group & 0x7F) << 7 * place
        if group <= 0x7F:
            start = 2 + place
            return start, start + length
    return 0, 0
