"""Messages of chunks, held against protobuf's own."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from minga.federation import chunks
from minga.federation.limits import CHUNK_BYTES
from minga.federation.v1 import federation_pb2 as pb

CONTENT = st.binary(max_size=300)
SIZES = st.integers(0, 2**64 - 1)


@given(content=CONTENT.filter(bool), size=SIZES, is_packed=st.booleans())
def test_what_is_written_is_protobufs_own(content: bytes, size: int, is_packed: bool) -> None:
    """Both messages have the bytes that protobuf gives them, also around a view."""
    field = "zstd_chunk" if is_packed else "chunk"
    view = memoryview(content)
    upload = pb.UploadRequest(**{field: content}).SerializeToString()
    assert chunks.upload_request(view, is_packed=is_packed) == upload
    download = pb.DownloadResponse(**{field: content, "size": size}).SerializeToString()
    assert chunks.download_response(view, size, is_packed=is_packed) == download


@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, CHUNK_BYTES])
def test_what_is_read_lies_where_it_came_in(size: int) -> None:
    """Chunks of all lengths come back, as views of their messages."""
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    for chunk in (
        chunks.read_upload(pb.UploadRequest(chunk=content).SerializeToString()),
        chunks.read_download(pb.DownloadResponse(chunk=content, size=9).SerializeToString()),
    ):
        assert isinstance(chunk, chunks.Chunk)
        assert isinstance(chunk.content, memoryview)
        assert chunk.content == content


def test_an_empty_rest_has_a_size() -> None:
    """A download of nothing tells the blob's size all the same."""
    empty = chunks.read_download(chunks.download_response(b"", 7))
    assert (bytes(empty.content), empty.size) == (b"", 7)


MESSAGES = st.one_of(
    st.binary(max_size=60),
    st.builds(lambda *parts: b"".join(parts), CONTENT, CONTENT),
    st.builds(
        lambda chunk, size, frame, tail: (
            pb.DownloadResponse(chunk=chunk, size=size, zstd_chunk=frame).SerializeToString() + tail
        ),
        CONTENT,
        SIZES,
        st.one_of(st.just(b""), CONTENT),
        st.one_of(st.just(b""), st.binary(max_size=6)),
    ),
    st.builds(
        lambda first, second: (
            pb.UploadRequest(chunk=first).SerializeToString()
            + pb.UploadRequest(zstd_chunk=second).SerializeToString()
        ),
        CONTENT,
        CONTENT,
    ),
    st.builds(lambda size: bytes([0x12, *size]), st.binary(max_size=8)),
)


@given(data=MESSAGES)
def test_any_bytes_mean_what_they_mean_to_protobuf(data: bytes) -> None:
    """Whatever comes is read as protobuf reads it, or refused as it refuses it."""
    try:
        upload = pb.UploadRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            chunks.read_upload(data)
    else:
        mine = chunks.read_upload(data)
        if isinstance(mine, chunks.Chunk):
            field = "zstd_chunk" if mine.is_packed else "chunk"
            assert getattr(upload, field) == mine.content != b""
        else:
            assert mine == upload
            assert upload.chunk + upload.zstd_chunk == b""
    try:
        download = pb.DownloadResponse.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            chunks.read_download(data)
    else:
        chunk = chunks.read_download(data)
        assert chunk.is_packed == bool(download.zstd_chunk)
        assert chunk.content == (download.zstd_chunk or download.chunk)
        assert chunk.size == download.size
