"""The bulk transfer's gRPC service over a `BlobStore`.

The two hooks decide who may move what; the service itself knows sizes and digests only. What
blocks on the disk runs in threads, so that a large blob holds up nobody's control stream.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import BinaryIO, Protocol

import grpc

from minga.federation import chunks
from minga.federation.blobs import BlobStore
from minga.federation.blobs import Upload as OpenUpload
from minga.federation.chunks import Chunk
from minga.federation.compression import Packer, unpack
from minga.federation.coordinator.access import principal_of_call
from minga.federation.errors import AccessError, PeerError
from minga.federation.identity import Principal
from minga.federation.interception import Context, Handler
from minga.federation.limits import CHUNK_BYTES
from minga.federation.transfer import SERVICE
from minga.federation.transport import ACCEPTED_KEY
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc


class MayUpload(Protocol):
    """Decides whether somebody may send a blob."""

    def __call__(self, principal: Principal, digest: bytes, size: int) -> bool:
        """Tell whether it may; `size` is as announced."""
        ...


class MayDownload(Protocol):
    """Decides whether somebody may read a blob."""

    def __call__(self, principal: Principal, digest: bytes) -> bool:
        """Tell whether it may."""
        ...


class OnTransfer(Protocol):
    """Hears how many bytes of blobs a call moved, also of a call that broke."""

    def __call__(self, principal: Principal, *, received: int, sent: int) -> None:
        """Take note; `received` and `sent` as seen from the coordinator."""
        ...


class OnRefused(Protocol):
    """Hears of a transfer that was refused for what was sent: cut off, too long, not as named."""

    def __call__(self, principal: Principal, *, digest: bytes, error: PeerError) -> None:
        """Take note."""
        ...


class BlobServicer(pb_grpc.BlobServiceServicer):
    """Takes and gives blobs; errors reach callers through `transport.ErrorInterceptor`."""

    def __init__(
        self,
        blobs: BlobStore,
        *,
        may_upload: MayUpload,
        may_download: MayDownload,
        on_transfer: OnTransfer,
        on_refused: OnRefused,
    ) -> None:
        self._blobs = blobs
        self._may_upload = may_upload
        self._may_download = may_download
        self._on_transfer = on_transfer
        self._on_refused = on_refused

    def add_to(self, server: grpc.aio.Server) -> None:
        """Serve this on a server, with chunks that are not copied; see `chunks`."""
        handlers: dict[str, Handler] = {
            "Upload": grpc.stream_unary_rpc_method_handler(
                self.Upload, chunks.read_upload, pb.UploadResponse.SerializeToString
            ),
            "GetUploadOffset": grpc.unary_unary_rpc_method_handler(
                self.GetUploadOffset,
                pb.GetUploadOffsetRequest.FromString,
                pb.GetUploadOffsetResponse.SerializeToString,
            ),
            "Download": grpc.unary_stream_rpc_method_handler(
                self.Download, pb.DownloadRequest.FromString, chunks.serialize
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def Upload(
        self, request_iterator: AsyncIterator[Chunk | pb.UploadRequest | None], context: Context
    ) -> pb.UploadResponse:
        """Take a blob, from the offset that is here; a broken link leaves what came for later."""
        first = await anext(aiter(request_iterator), None)
        if not isinstance(first, pb.UploadRequest) or not first.HasField("header"):
            raise PeerError("an upload starts with its header")
        header = first.header
        principal = principal_of_call(context)
        if not self._may_upload(principal, header.digest, header.size):
            raise AccessError(f"{principal} may not upload blob {header.digest.hex()} now")
        if not self._blobs.has(header.digest):
            upload = await asyncio.to_thread(
                self._blobs.begin, header.digest, size=header.size, sender=sender_of(principal)
            )
            with upload:
                # Tells a sender that waits for it that its chunks are welcome.
                await context.send_initial_metadata(((ACCEPTED_KEY, "1"),))
                try:
                    await self._receive(upload, header.offset, request_iterator, principal)
                except PeerError as error:
                    self._on_refused(principal, digest=header.digest, error=error)
                    raise
        return pb.UploadResponse(size=header.size)

    async def GetUploadOffset(
        self, request: pb.GetUploadOffsetRequest, context: Context
    ) -> pb.GetUploadOffsetResponse:
        """Tell from where on the caller should send."""
        sender = sender_of(principal_of_call(context))
        return pb.GetUploadOffsetResponse(
            offset=self._blobs.offset(request.digest, sender),
            complete=self._blobs.has(request.digest),
        )

    async def Download(  # type: ignore[override] # gRPC takes a coroutine as well
        self, request: pb.DownloadRequest, context: Context
    ) -> None:
        """Give a blob from an offset on; of an empty rest comes one empty message.

        It writes through the context: of a generator that is cancelled while the caller reads
        nothing, gRPC (1.85) would not tell the caller that it ended.
        """
        principal = principal_of_call(context)
        if not self._may_download(principal, request.digest):
            raise AccessError(f"{principal} may not download blob {request.digest.hex()} now")
        sent, packer = 0, Packer() if request.takes_zstd else None
        with self._blobs.open(request.digest) as file:
            size, offset = file.seek(0, os.SEEK_END), request.offset
            if offset > size:
                raise PeerError(f"the blob has {size} bytes, none at offset {offset}")
            buffer = memoryview(bytearray(min(CHUNK_BYTES, size - offset)))
            try:
                while True:
                    chunk = buffer[: await _read(file, offset, buffer)]
                    frame = await asyncio.to_thread(packer.pack, chunk) if packer else None
                    content = chunk if frame is None else frame
                    await context.write(
                        chunks.download_response(content, size, is_packed=frame is not None)
                    )
                    sent, offset = sent + len(content), offset + len(chunk)
                    if offset >= size:
                        break
            except grpc.aio.InternalError:
                pass  # the link broke; the caller asks again from where it is
            finally:
                self._on_transfer(principal, received=0, sent=sent)

    async def _receive(
        self,
        upload: OpenUpload,
        offset: int,
        requests: AsyncIterator[Chunk | pb.UploadRequest | None],
        principal: Principal,
    ) -> None:
        """Take the chunks that follow a header, and finish."""
        received = 0
        try:
            async for chunk in requests:
                if not isinstance(chunk, Chunk):
                    raise PeerError("after the header come chunks, and none is empty")
                received += len(chunk.content)
                offset += await asyncio.to_thread(_append, upload, offset, chunk)
        finally:
            self._on_transfer(principal, received=received, sent=0)
        await asyncio.to_thread(upload.finish)


def _append(upload: OpenUpload, offset: int, chunk: Chunk) -> int:
    """Add a chunk to an upload; gives how many bytes it holds."""
    content = unpack(chunk.content) if chunk.is_packed else chunk.content
    if not content:
        raise PeerError("a chunk is empty")
    upload.append(offset, content)
    return len(content)


async def _read(file: BinaryIO, offset: int, buffer: memoryview) -> int:
    """Fill a buffer from a file, and say how far.

    What the kernel has in memory is there sooner than a thread would be; for the disk one waits.
    """
    try:
        return os.preadv(file.fileno(), [buffer], offset, os.RWF_NOWAIT)
    except OSError:  # it is not in memory, or the file system cannot tell
        return await asyncio.to_thread(os.preadv, file.fileno(), [buffer], offset)


def sender_of(principal: Principal) -> str:
    """Name a principal to the store: a device and an operator of one name stay apart."""
    return f"{principal.role}-{principal.name}"
