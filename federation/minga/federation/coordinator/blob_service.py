"""The bulk transfer's gRPC service over a `BlobStore`.

The two hooks decide who may move what; the service itself knows sizes and digests only. What
blocks on the disk runs in threads, so that a large blob holds up nobody's control stream.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from minga.federation.blobs import BlobStore
from minga.federation.blobs import Upload as OpenUpload
from minga.federation.compression import Packer, unpack
from minga.federation.coordinator.access import principal_of_call
from minga.federation.errors import AccessError, PeerError
from minga.federation.identity import Principal
from minga.federation.interception import Context
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

    async def Upload(
        self, request_iterator: AsyncIterator[pb.UploadRequest | None], context: Context
    ) -> pb.UploadResponse:
        """Take a blob, from the offset that is here; a broken link leaves what came for later."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("part") != "header":
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

    async def Download(
        self, request: pb.DownloadRequest, context: Context
    ) -> AsyncIterator[pb.DownloadResponse]:
        """Give a blob from an offset on; of an empty rest comes one empty message."""
        principal = principal_of_call(context)
        if not self._may_download(principal, request.digest):
            raise AccessError(f"{principal} may not download blob {request.digest.hex()} now")
        size = self._blobs.size(request.digest)
        if request.offset > size:
            raise PeerError(f"the blob has {size} bytes, none at offset {request.offset}")
        chunks = self._blobs.chunks(request.digest, offset=request.offset)
        packer = Packer() if request.takes_zstd else None
        sent = 0
        try:
            response = await asyncio.to_thread(_next_response, chunks, size, packer)
            while True:
                yield response
                sent += len(response.chunk or response.zstd_chunk)
                response = await asyncio.to_thread(_next_response, chunks, size, packer)
                if not (response.chunk or response.zstd_chunk):
                    break
        finally:
            self._on_transfer(principal, received=0, sent=sent)

    async def _receive(
        self,
        upload: OpenUpload,
        offset: int,
        requests: AsyncIterator[pb.UploadRequest | None],
        principal: Principal,
    ) -> None:
        """Take the chunks that follow a header, and finish."""
        received = 0
        try:
            async for request in requests:
                chunk = b"" if request is None else request.chunk  # each access copies
                if chunk:
                    received += len(chunk)
                elif request is not None and (frame := request.zstd_chunk):
                    received += len(frame)
                    chunk = await asyncio.to_thread(unpack, frame)
                if not chunk:
                    raise PeerError("after the header come chunks, and none is empty")
                await asyncio.to_thread(upload.append, offset, chunk)
                offset += len(chunk)
        finally:
            self._on_transfer(principal, received=received, sent=0)
        await asyncio.to_thread(upload.finish)


def _next_response(
    chunks: Iterator[bytes], size: int, packer: Packer | None
) -> pb.DownloadResponse:
    """Read and pack the next piece of a blob; an empty one comes after the last."""
    chunk = next(chunks, b"")
    frame = packer.pack(chunk) if packer else None
    if frame is not None:
        return pb.DownloadResponse(zstd_chunk=frame, size=size)
    return pb.DownloadResponse(chunk=chunk, size=size)


def sender_of(principal: Principal) -> str:
    """Name a principal to the store: a device and an operator of one name stay apart."""
    return f"{principal.role}-{principal.name}"
