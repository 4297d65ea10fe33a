"""Chunks as Zstandard frames, alone and on links that break."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from minga.federation import transfer
from minga.federation.compression import WORTHWHILE, Packer, unpack
from minga.federation.errors import PeerError
from minga.federation.limits import CHUNK_BYTES, MIB
from minga.federation.transport import calling
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.blobs.depot import Depot

QUICK = transfer.Retry(attempts=4, first_delay_s=0.01, max_delay_s=0.05)


def weights(num_bytes: int) -> bytes:
    """Give float32 weights most of which are zero, as those of unused inputs are."""
    values = np.random.default_rng(0).normal(size=num_bytes // 4).astype(np.float32)
    values[np.random.default_rng(1).random(values.size) < 0.7] = 0
    return values.tobytes()


def test_weights_shrink_and_come_back() -> None:
    """A frame is smaller than what it holds and gives it back to the bit."""
    chunk = weights(CHUNK_BYTES)
    frame = Packer().pack(chunk)
    assert frame is not None
    assert len(frame) < WORTHWHILE * len(chunk)
    assert unpack(frame) == chunk


def test_random_bits_cost_one_try() -> None:
    """After a chunk that does not shrink the rest of its blob goes as it is."""
    packer = Packer()
    assert packer.pack(os.urandom(CHUNK_BYTES)) is None
    assert packer.pack(bytes(CHUNK_BYTES)) is None
    assert Packer().pack(bytes(CHUNK_BYTES)) is not None
    assert Packer().pack(b"") is None


def streamed(size: int) -> bytes:
    """Give a frame that does not say how much it holds."""
    compressor = zstandard.ZstdCompressor().compressobj()
    return compressor.compress(bytes(size)) + compressor.flush()


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (zstandard.compress(bytes(2**30)), "1073741824 bytes"),
        (zstandard.compress(bytes(CHUNK_BYTES + 1)), "at most"),
        (streamed(10), "unknown"),
        (zstandard.compress(weights(4096))[:-5], "no Zstandard frame"),
        (b"no frame at all", "no Zstandard frame"),
    ],
    ids=["a gigabyte", "one byte too many", "of unknown size", "cut off", "garbage"],
)
def test_hostile_frames(frame: bytes, reason: str) -> None:
    """What would fill the memory, or is no frame, is refused before it is unpacked."""
    with pytest.raises(PeerError, match=reason):
        unpack(frame)


@pytest.mark.parametrize("size", [0, 4, 3 * CHUNK_BYTES + 4])
async def test_there_and_back(
    depot: Depot,
    address: str,
    connect: Any,
    tmp_path: Path,
    size: int,
) -> None:
    """Content and digest are those of the sender; fewer bytes than that are on the wire."""
    stub, data, target = connect(address), weights(size), tmp_path / "target"
    digest = transfer.digest_of(data)
    await transfer.upload(stub, data, digest, address=address, compress=True)
    assert depot.store.read(digest) == data
    await transfer.download(stub, digest, target, address=address, compress=True)
    assert target.read_bytes() == data
    if size > CHUNK_BYTES:
        assert depot.received["press-7"] < 0.6 * size
        assert depot.sent["press-7"] < 0.6 * size


async def test_random_bits_travel_as_they_are(
    depot: Depot,
    address: str,
    connect: Any,
    tmp_path: Path,
) -> None:
    """A masked update, asked to be packed, takes not one byte more or less."""
    stub, data, target = connect(address), os.urandom(MIB), tmp_path / "target"
    digest = transfer.digest_of(data)
    await transfer.upload(stub, data, digest, address=address, compress=True)
    await transfer.download(stub, digest, target, address=address, compress=True)
    assert target.read_bytes() == data
    assert depot.received == depot.sent == {"press-7": MIB}


async def test_broken_links_resume(
    depot: Depot,
    address: str,
    connect: Any,
    cutting_proxy: Any,
    tmp_path: Path,
) -> None:
    """Both directions go on at the offset in the content, not at one in the frames."""
    data, target = weights(8 * MIB), tmp_path / "target"
    digest = transfer.digest_of(data)
    proxy = await cutting_proxy(address, [3 * MIB // 2, 2**40, MIB])
    await transfer.upload(
        connect(proxy.address), data, digest, address=proxy.address, compress=True, retry=QUICK
    )
    assert depot.store.read(digest) == data
    await transfer.download(
        connect(proxy.address), digest, target, address=proxy.address, compress=True, retry=QUICK
    )
    assert target.read_bytes() == data
    assert proxy.num_connections > 2
    assert depot.received["press-7"] + depot.sent["press-7"] < 1.5 * len(data)


async def test_bomb_on_the_wire(depot: Depot, address: str, connect: Any) -> None:
    """A gigabyte of zeros in a small frame is refused by name; nothing of it is stored."""
    stub, digest = connect(address), bytes(32)

    async def send() -> None:
        call = stub.Upload()
        await call.write(pb.UploadRequest(header=pb.UploadHeader(digest=digest, size=MIB)))
        await call.initial_metadata()
        await call.write(pb.UploadRequest(zstd_chunk=zstandard.compress(bytes(2**30))))
        with calling(address):
            await call

    with pytest.raises(PeerError, match="1073741824 bytes"):
        await send()
    assert depot.complaints == [("press-7", digest)]
    assert depot.store.offset(digest, "device-press-7") == 0
