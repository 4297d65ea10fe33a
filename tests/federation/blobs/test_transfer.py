"""Blobs over real TLS on links that break."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from minga.federation import transfer
from minga.federation.errors import (
    AccessError,
    LimitError,
    MissingBlobError,
    PeerError,
    UnreachableError,
)
from minga.federation.identity import Role
from minga.federation.limits import CHUNK_BYTES, MIB
from minga.federation.transport import calling
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.blobs.depot import Depot

Serve = Callable[..., Awaitable[str]]
StartProxy = Callable[[str, list[int]], Awaitable[Any]]
QUICK = transfer.Retry(attempts=4, first_delay_s=0.01, max_delay_s=0.05)


# -- without breaks ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 1])
async def test_a_blob_goes_there_and_back(
    depot: Depot, address: str, connect: Any, tmp_path: Path, size: int
) -> None:
    """From memory and from a file; sent again, it moves no bytes; both sides count."""
    stub = connect(address)
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    digest = transfer.digest_of(data)
    assert transfer.digest_of(tmp_path / "source") == digest
    await transfer.upload(stub, data, digest, address=address)
    assert depot.store.read(digest) == data
    await transfer.upload(stub, tmp_path / "source", digest, address=address)
    assert depot.received == {"press-7": size}
    depot.store.delete(digest)
    await transfer.upload(stub, tmp_path / "source", digest, address=address)
    await transfer.download(stub, digest, tmp_path / "target", address=address)
    assert (tmp_path / "target").read_bytes() == data
    assert depot.sent == {"press-7": size}
    assert sorted(path.name for path in tmp_path.iterdir() if "part" in path.name) == []


async def test_several_devices_at_once(depot: Depot, address: str, connect: Any) -> None:
    """Eight senders of 1 MiB each; one of them sends what another one sends."""
    blobs = [os.urandom(MIB) for _ in range(7)]
    blobs.append(blobs[0])
    await asyncio.gather(
        *(
            transfer.upload(
                connect(address, f"press-{number}"),
                data,
                transfer.digest_of(data),
                address=address,
            )
            for number, data in enumerate(blobs)
        )
    )
    assert all(depot.store.read(transfer.digest_of(data)) == data for data in blobs)


# -- broken links -----------------------------------------------------------------------------


async def test_an_upload_goes_on_after_a_cut(
    depot: Depot, address: str, connect: Any, cutting_proxy: StartProxy
) -> None:
    """Three links break in the middle of 8 MiB; what came through is not sent again."""
    proxy = await cutting_proxy(address, [3 * MIB, 2 * MIB, MIB])
    data = os.urandom(8 * MIB)
    digest = transfer.digest_of(data)
    stub = connect(proxy.address)
    await transfer.upload(stub, data, digest, address=proxy.address, retry=QUICK)
    assert depot.store.read(digest) == data
    assert proxy.num_connections == 4
    assert depot.received["press-7"] < len(data) + 3 * CHUNK_BYTES


async def test_a_wrong_guess_costs_a_call_alone(
    depot: Depot, address: str, connect: Any, cutting_proxy: StartProxy
) -> None:
    """A blob that is taken for new goes on from its part, and is not sent again when complete."""
    proxy = await cutting_proxy(address, [6 * MIB])
    data = os.urandom(8 * MIB)
    digest = transfer.digest_of(data)
    stub = connect(proxy.address)
    await transfer.upload(stub, data, digest, address=proxy.address, is_new=True, retry=QUICK)
    assert depot.store.read(digest) == data
    received = depot.received["press-7"]
    assert received < len(data) + 2 * CHUNK_BYTES
    await transfer.upload(connect(address), data, digest, address=address, is_new=True)
    assert depot.received["press-7"] == received


async def test_a_download_goes_on_after_a_cut(
    depot: Depot, address: str, connect: Any, cutting_proxy: StartProxy, tmp_path: Path
) -> None:
    """Three links break in the middle of 8 MiB; the file appears when it is complete."""
    proxy = await cutting_proxy(address, [3 * MIB, 2 * MIB, MIB])
    data = os.urandom(8 * MIB)
    digest = depot.store.put_bytes(data)
    stub = connect(proxy.address)
    await transfer.download(
        stub, digest, tmp_path / "model.onnx", address=proxy.address, retry=QUICK
    )
    assert (tmp_path / "model.onnx").read_bytes() == data
    assert proxy.num_connections == 4
    # What was under way when a link broke counts as sent.
    assert depot.sent["press-7"] < len(data) + 3 * MIB
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["model.onnx"]


async def test_progress_buys_patience(
    depot: Depot, address: str, connect: Any, cutting_proxy: StartProxy, tmp_path: Path
) -> None:
    """More cuts than attempts, each after some bytes: the transfer ends all the same."""
    proxy = await cutting_proxy(address, [2 * MIB] * 6)
    data = os.urandom(8 * MIB)
    digest = depot.store.put_bytes(data)
    await transfer.download(
        connect(proxy.address),
        digest,
        tmp_path / "file",
        address=proxy.address,
        retry=transfer.Retry(attempts=3, first_delay_s=0.01),
    )
    assert proxy.num_connections > 3


async def test_a_link_that_stays_broken_is_told(
    depot: Depot, address: str, connect: Any, cutting_proxy: StartProxy, tmp_path: Path
) -> None:
    """After the attempts without progress; what came stays for the next transfer."""
    proxy = await cutting_proxy(address, [3 * MIB] + [0] * 100)
    data = os.urandom(8 * MIB)
    digest = depot.store.put_bytes(data)
    stub = connect(proxy.address)
    with pytest.raises(UnreachableError, match=proxy.address):
        await transfer.download(stub, digest, tmp_path / "file", address=proxy.address, retry=QUICK)
    part = next(tmp_path.glob(".file.*.part"))
    assert MIB <= part.stat().st_size < 3 * MIB
    assert not (tmp_path / "file").exists()
    sent, had = depot.sent["press-7"], part.stat().st_size
    await transfer.download(connect(address), digest, tmp_path / "file", address=address)
    assert (tmp_path / "file").read_bytes() == data
    assert depot.sent["press-7"] == sent + len(data) - had


async def test_an_upload_goes_on_in_another_process_of_the_coordinator(
    address: str, connect: Any, cutting_proxy: StartProxy, serve: Serve, tmp_path: Path
) -> None:
    """The coordinator is gone in the middle; the next one has the part."""
    proxy = await cutting_proxy(address, [3 * MIB] + [0] * 100)
    data = os.urandom(8 * MIB)
    digest = transfer.digest_of(data)
    with pytest.raises(UnreachableError):
        await transfer.upload(
            connect(proxy.address), data, digest, address=proxy.address, retry=QUICK
        )
    next_depot = Depot(tmp_path / "blobs")
    next_address = await serve(next_depot.add_services)
    await transfer.upload(connect(next_address), data, digest, address=next_address)
    assert next_depot.store.read(digest) == data
    assert next_depot.received["press-7"] <= 7 * MIB


# -- bad content ------------------------------------------------------------------------------


async def test_a_tampered_upload_is_refused(depot: Depot, address: str, connect: Any) -> None:
    """The digest is not the content's; nothing is stored."""
    digest = transfer.digest_of(b"announced")
    with pytest.raises(PeerError, match="announced was"):
        await transfer.upload(connect(address), b"other", digest, address=address, retry=QUICK)
    assert not depot.store.has(digest)


async def test_a_tampered_download_is_refused(
    depot: Depot, address: str, connect: Any, tmp_path: Path
) -> None:
    """Somebody changed the file at the coordinator; the device does not take it."""
    digest = depot.store.put_bytes(b"the model")
    depot.store.path(digest).write_bytes(b"the mOdel")
    with pytest.raises(PeerError, match="announced was"):
        await transfer.download(connect(address), digest, tmp_path / "file", address=address)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


async def test_a_damaged_part_is_fetched_once_more(
    depot: Depot, address: str, connect: Any, tmp_path: Path
) -> None:
    """The device lost power while fetching: the damage is found and healed, in both directions."""
    stub = connect(address)
    data = os.urandom(2 * MIB)
    digest = depot.store.put_bytes(data)
    (tmp_path / f".file.{digest.hex()}.part").write_bytes(b"\0" * MIB)
    await transfer.download(stub, digest, tmp_path / "file", address=address, retry=QUICK)
    assert (tmp_path / "file").read_bytes() == data
    depot.store.delete(digest)
    part = tmp_path / "blobs" / "parts" / "device-press-7" / f"{digest.hex()}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\0" * MIB)
    await transfer.upload(stub, data, digest, address=address, retry=QUICK)
    assert depot.store.read(digest) == data


async def test_a_part_longer_than_the_blob_is_fetched_anew(
    depot: Depot, address: str, connect: Any, tmp_path: Path
) -> None:
    """The coordinator refuses the offset; the device begins again."""
    digest = depot.store.put_bytes(b"short")
    (tmp_path / f".file.{digest.hex()}.part").write_bytes(b"\0" * 100)
    await transfer.download(connect(address), digest, tmp_path / "file", address=address)
    assert (tmp_path / "file").read_bytes() == b"short"


async def test_parts_of_former_contents_are_removed(
    depot: Depot, address: str, connect: Any, tmp_path: Path
) -> None:
    """A device that never finished an old model does not keep its part for ever."""
    old = tmp_path / f".file.{'0' * 64}.part"
    old.write_bytes(b"old")
    digest = depot.store.put_bytes(b"new")
    await transfer.download(connect(address), digest, tmp_path / "file", address=address)
    assert not old.exists()


# -- limits and policy ------------------------------------------------------------------------


async def test_an_oversize_blob_is_refused(
    depot: Depot, address: str, connect: Any, tmp_path: Path
) -> None:
    """By the coordinator before a byte is sent, and by the device before a byte is kept."""
    stub = connect(address)
    data = os.urandom(17 * MIB)
    digest = transfer.digest_of(data)
    with pytest.raises(LimitError, match="over the limit"):
        await transfer.upload(stub, data, digest, address=address)
    assert depot.received == {}
    digest = depot.store.put_bytes(data[:MIB])
    with pytest.raises(LimitError, match="more than the 1000 allowed"):
        await transfer.download(stub, digest, tmp_path / "f", address=address, max_bytes=1000)
    assert not list(tmp_path.glob(".f.*"))


async def test_a_sender_s_quota_is_its_own(depot: Depot, address: str, connect: Any) -> None:
    """The third blob does not fit; an operator of the same name still may send it."""
    blobs = [os.urandom(10 * MIB) for _ in range(3)]
    device = connect(address, "press-7")
    for data in blobs[:2]:
        await transfer.upload(device, data, transfer.digest_of(data), address=address)
    digest = transfer.digest_of(blobs[2])
    with pytest.raises(LimitError, match="device-press-7 has 20971520 bytes here"):
        await transfer.upload(device, blobs[2], digest, address=address)
    operator = connect(address, "press-7", Role.OPERATOR)
    await transfer.upload(operator, blobs[2], digest, address=address)


async def test_what_is_not_expected_is_refused(
    depot: Depot, address: str, connect: Any, tmp_path: Path
) -> None:
    """The hooks decide in both directions, before anything is moved."""
    stub = connect(address)
    digest = depot.store.put_bytes(b"private")
    wanted = transfer.digest_of(b"unexpected")
    depot.refused |= {digest, wanted}
    with pytest.raises(AccessError, match="device 'press-7' may not download"):
        await transfer.download(stub, digest, tmp_path / "file", address=address)
    with pytest.raises(AccessError, match="device 'press-7' may not upload"):
        await transfer.upload(stub, b"unexpected", wanted, address=address)


@pytest.mark.parametrize("is_new", [True, False])
async def test_a_refusal_is_final(depot: Depot, address: str, connect: Any, is_new: bool) -> None:
    """What the coordinator refuses by its status is sent once, also if it was taken for new."""
    data = os.urandom(3 * CHUNK_BYTES)
    digest = transfer.digest_of(data)
    depot.refused.add(digest)
    with pytest.raises(AccessError, match="may not upload"):
        await transfer.upload(connect(address), data, digest, address=address, is_new=is_new)
    assert depot.num_asked == 1


async def test_a_missing_blob_is_told(address: str, connect: Any, tmp_path: Path) -> None:
    """At once, without patience."""
    with pytest.raises(MissingBlobError, match="deleted, or never uploaded"):
        await transfer.download(connect(address), b"m" * 32, tmp_path / "file", address=address)


def header(size: int, offset: int = 0, digest: bytes = b"d" * 32) -> pb.UploadRequest:
    """Announce a blob."""
    return pb.UploadRequest(header=pb.UploadHeader(digest=digest, size=size, offset=offset))


def chunk(data: bytes) -> pb.UploadRequest:
    """Send bytes."""
    return pb.UploadRequest(chunk=data)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "starts with its header"),
        ([chunk(b"x")], "starts with its header"),
        ([pb.UploadRequest()], "starts with its header"),
        ([header(9, digest=b"short")], "32 bytes"),
        ([header(2), header(2)], "none is empty"),
        ([header(2), chunk(b"")], "none is empty"),
        ([header(2), chunk(b"x")], "after 1 of 2 bytes"),
        ([header(2), chunk(b"xyz")], "announced with 2 bytes"),
        ([header(2, offset=1), chunk(b"x")], "offset 1 came, expected 0"),
        ([header(2**63)], "over the limit"),
    ],
    ids=range(10),
)
async def test_a_malformed_upload_is_refused(
    address: str, connect: Any, requests: list[pb.UploadRequest], message: str
) -> None:
    """Each with what is wrong; the service goes on."""
    stub = connect(address)

    async def send() -> AsyncIterator[pb.UploadRequest]:
        for request in requests:
            yield request

    with pytest.raises(PeerError, match=message), calling(address):
        await stub.Upload(send())
    await transfer.upload(stub, b"good", transfer.digest_of(b"good"), address=address)
