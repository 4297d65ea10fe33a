"""Moving blobs over a link that breaks: both directions go on where they stopped.

Only a link that broke is tried again, and the count of tries starts anew whenever bytes got
through: a transfer over a bad link ends as long as it makes progress. What the other side refused
(a limit, a role) is raised at once. A resumed blob that turns out damaged at its end is moved once
more from the start, since the damage may be older than this transfer; then it is an error.
"""

import asyncio
import glob
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from google.protobuf.message import Message

from minga.federation import chunks
from minga.federation.chunks import Chunk
from minga.federation.compression import Packer, unpack
from minga.federation.errors import LimitError, PeerError, UnreachableError
from minga.federation.limits import CALL_TIMEOUT_S, CHUNK_BYTES, MAX_BLOB_BYTES, REFUSAL_GRACE_S
from minga.federation.part_file import PartFile
from minga.federation.transport import ACCEPTED_KEY, calling
from minga.federation.v1 import federation_pb2 as pb

_CHUNKS_AT_ONCE: Final = 4
"""A download goes to the disk so many chunks at a time."""

SERVICE: Final = pb.DESCRIPTOR.services_by_name["BlobService"].full_name


class BlobStub:
    """The blob service as its callers see it, with chunks that are not copied; see `chunks`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.Upload = channel.stream_unary(
            f"/{SERVICE}/Upload",
            request_serializer=chunks.serialize,
            response_deserializer=pb.UploadResponse.FromString,
        )
        self.GetUploadOffset = channel.unary_unary(
            f"/{SERVICE}/GetUploadOffset",
            request_serializer=pb.GetUploadOffsetRequest.SerializeToString,
            response_deserializer=pb.GetUploadOffsetResponse.FromString,
        )
        self.Download = channel.unary_stream(
            f"/{SERVICE}/Download",
            request_serializer=pb.DownloadRequest.SerializeToString,
            response_deserializer=chunks.read_download,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How patient a transfer is with a link that breaks without letting bytes through."""

    attempts: int = 8
    first_delay_s: float = 0.2
    max_delay_s: float = 10.0

    def delay_s(self, failures: int) -> float:
        """Give the pause after some failures in a row; at random, so that a fleet spreads out."""
        longest = min(self.max_delay_s, self.first_delay_s * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - nothing secret about a pause


@dataclass(slots=True)
class Moved:
    """What a transfer took, broken attempts included."""

    content_bytes: int = 0
    """Of the blob, unpacked."""
    wire_bytes: int = 0
    """What its chunks took on the link; packed ones take less."""
    seconds: float = 0.0
    """From the first chunk that was asked for or sent to the end."""

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Count the time that the body takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start


@dataclass(slots=True)
class _Progress:
    """What one transfer has seen so far."""

    moved: Moved
    offset: int = 0
    failures: int = 0
    is_resumed: bool = False
    is_restarted: bool = False

    def note(self, offset: int) -> None:
        """Take down how many bytes are through."""
        if offset > self.offset:
            self.failures = 0
        self.offset = offset


UploadCall = grpc.aio.StreamUnaryCall[Message | bytes, pb.UploadResponse]

Content = Path | bytes | memoryview
"""What is sent: a file's content, or bytes."""


def digest_of(source: Content) -> bytes:
    """Give the digest of content, or of a file's, that names it as a blob: SHA-256, 32 bytes."""
    if not isinstance(source, Path):
        return hashlib.sha256(source).digest()
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


async def upload(
    stub: BlobStub,
    source: Content,
    digest: bytes,
    *,
    address: str,
    compress: bool = False,
    is_new: bool = False,
    retry: Retry | None = None,
) -> Moved:
    """Send a blob, from where the coordinator has it on; returns when it is stored there.

    Args:
        stub: The blob service.
        source: The content, or the file that holds it.
        digest: SHA-256 of the content, 32 bytes.
        address: The coordinator's address, for messages.
        compress: Send Zstandard frames, as long as they are smaller than what they hold.
        is_new: True if it is not likely to have any of it yet: it is asked only if that fails.
        retry: How patient to be.

    Returns:
        What it took.

    Raises:
        UnreachableError: the link stayed broken.
        PeerError: the content does not have that digest.
        LimitError: the blob or the sender's quota is too large.
        AccessError: this blob is not expected from this sender.
    """
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    moved = Moved()

    async def send(offset: int) -> None:
        header = pb.UploadHeader(digest=digest, size=size, offset=offset)
        await _send(stub, header, source, Packer() if compress else None, moved)

    async def attempt(progress: _Progress) -> None:
        with calling(address):
            known = await stub.GetUploadOffset(
                pb.GetUploadOffsetRequest(digest=digest), timeout=CALL_TIMEOUT_S
            )
            progress.note(known.offset)
            progress.is_resumed = known.offset > 0
            if not known.complete:
                await send(min(known.offset, size))

    if is_new:
        try:
            with calling(address):
                await send(0)
            return moved
        except LimitError:
            raise
        except (UnreachableError, PeerError):
            pass  # the link broke, or it has a part of it already: now it is asked
    await _persist(attempt, retry or Retry(), moved)
    return moved


async def download(
    stub: BlobStub,
    digest: bytes,
    path: Path,
    *,
    address: str,
    max_bytes: int = MAX_BLOB_BYTES,
    compress: bool = False,
    is_durable: bool = True,
    retry: Retry | None = None,
) -> Moved:
    """Fetch a blob into a file, which appears when it is complete and its digest was checked.

    What came so far waits beside the file under a name with the digest, also for another process.

    Args:
        stub: The blob service.
        digest: SHA-256 of the content, 32 bytes.
        path: Where the blob goes; replaced if it exists.
        address: The coordinator's address, for messages.
        max_bytes: Largest blob that is taken.
        compress: Ask for Zstandard frames.
        is_durable: False if nobody needs the file after a loss of power.
        retry: How patient to be.

    Returns:
        What it took.

    Raises:
        UnreachableError: the link stayed broken.
        MissingBlobError: the coordinator has no such blob.
        PeerError: what came does not have that digest.
        LimitError: the blob is too large.
        AccessError: this caller may not have it.
    """
    part_path = path.with_name(f".{path.name}.{digest.hex()}.part")
    _remove_other_parts(path, part_path)
    moved = Moved()

    async def attempt(progress: _Progress) -> None:
        offset = part_path.stat().st_size if part_path.exists() else 0
        progress.is_resumed = offset > 0
        request = pb.DownloadRequest(digest=digest, offset=offset, takes_zstd=compress)
        try:
            with calling(address):
                part = await _receive(stub, request, part_path, progress, max_bytes)
            await asyncio.to_thread(part.finish, path, is_durable=is_durable)
        except PeerError:
            part_path.unlink(missing_ok=True)
            raise

    await _persist(attempt, retry or Retry(), moved)
    return moved


async def _persist(
    attempt: Callable[[_Progress], Awaitable[None]], retry: Retry, moved: Moved
) -> None:
    """Try until it is done, the link stays broken, or the other side refuses."""
    progress = _Progress(moved)
    while True:
        try:
            return await attempt(progress)
        except UnreachableError:
            progress.failures += 1
            if progress.failures >= retry.attempts:
                raise
            await asyncio.sleep(retry.delay_s(progress.failures))
        except LimitError:
            raise
        except PeerError:
            if progress.is_restarted or not progress.is_resumed:
                raise
            progress.is_restarted = True


async def _send(
    stub: BlobStub,
    header: pb.UploadHeader,
    source: Content,
    packer: Packer | None,
    moved: Moved,
) -> None:
    """Send the header, wait until it is accepted or refused, send the rest."""
    call = stub.Upload()
    pieces = _pieces(source, header.offset)
    try:
        await call.write(pb.UploadRequest(header=header))
        if not await _is_accepted(call):
            await call  # says why, or that the blob is there already
            return
        with moved.timing():
            while True:
                if packer is None and not isinstance(source, Path):
                    request = _next_request(pieces, packer, moved)  # nothing waits for a disk
                else:
                    request = await asyncio.to_thread(_next_request, pieces, packer, moved)
                if request is None:
                    break
                await call.write(request)
            await call.done_writing()
            await call
    except (asyncio.InvalidStateError, grpc.aio.InternalError):
        await call  # the coordinator has answered already; the call says what


async def _is_accepted(call: UploadCall) -> bool:
    """Tell whether chunks are welcome, or the coordinator has ended the call, or is about to.

    Chunks sent into a refusal would be lost, and so would its reason: see `error_of`. A coordinator
    that does not speak of it yet is taken at its silence.
    """
    if ACCEPTED_KEY in dict(await call.initial_metadata()):
        return True
    with suppress(TimeoutError):
        async with asyncio.timeout(REFUSAL_GRACE_S):
            await call.code()
            return False
    return True


def _next_request(
    pieces: Generator[chunks.Buffer, None, None], packer: Packer | None, moved: Moved
) -> bytes | None:
    """Read and pack the next piece of a blob, and give its message; None after the last."""
    chunk = next(pieces, b"")
    frame = packer.pack(chunk) if packer else None
    moved.content_bytes += len(chunk)
    moved.wire_bytes += len(chunk if frame is None else frame)
    if frame is not None:
        return chunks.upload_request(frame, is_packed=True)
    return chunks.upload_request(chunk) if chunk else None


def _pieces(source: Content, offset: int) -> Generator[chunks.Buffer, None, None]:
    """Cut the content into chunks, from an offset on."""
    if not isinstance(source, Path):
        content = memoryview(source)
        for start in range(offset, len(content), CHUNK_BYTES):
            yield content[start : start + CHUNK_BYTES]
        return
    with source.open("rb") as file:
        file.seek(offset)
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


async def _receive(
    stub: BlobStub,
    request: pb.DownloadRequest,
    part_path: Path,
    progress: _Progress,
    max_bytes: int,
) -> PartFile:
    """Append what comes to the part, until the other side has sent all.

    The part is returned open: the caller finishes it.
    """
    part: PartFile | None = None
    waiting: list[Chunk] = []
    try:
        with progress.moved.timing():
            try:
                async for chunk in stub.Download(request):
                    if part is None:
                        part = _part(part_path, request.digest, chunk.size, max_bytes)
                    waiting.append(chunk)
                    if len(waiting) == _CHUNKS_AT_ONCE:
                        await _append(part, waiting, progress)
            finally:  # of a link that breaks, what came is kept
                if part is not None and waiting:
                    await _append(part, waiting, progress)
    except BaseException:
        if part is not None:
            part.close()
        raise
    if part is None:
        raise PeerError("the coordinator sent an empty answer instead of the blob")
    return part


async def _append(part: PartFile, waiting: list[Chunk], progress: _Progress) -> None:
    """Append chunks, and forget them.

    Several at once: with each of them alone, going to a thread and back takes as long as the disk.
    """
    taken, waiting[:] = tuple(waiting), ()
    await asyncio.to_thread(_append_all, part, taken, progress.moved)
    progress.note(part.offset)


def _append_all(part: PartFile, taken: Sequence[Chunk], moved: Moved) -> None:
    part.open()
    for chunk in taken:
        content = unpack(chunk.content) if chunk.is_packed else chunk.content
        moved.content_bytes += len(content)
        moved.wire_bytes += len(chunk.content)
        part.append(part.offset, content)


def _part(path: Path, digest: bytes, size: int, max_bytes: int) -> PartFile:
    if size > max_bytes:
        raise LimitError(f"the blob has {size} bytes, more than the {max_bytes} allowed here")
    return PartFile(path, digest=digest, size=size)


def _remove_other_parts(path: Path, part_path: Path) -> None:
    """Forget what was fetched of earlier contents of the same file."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if other != part_path:
            other.unlink(missing_ok=True)
