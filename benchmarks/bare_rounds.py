"""The limit that `rounds.py` compares with: gRPC, mutual TLS and nothing else.

One grpc.aio server and as many processes as there are devices, each with one open stream. In a
round the server sends the model down each stream in pieces, and each device sends as many bytes
back, which the server adds up. Pieces are raw bytes: no protobuf, no disk, no digest, no protocol.
"""

import asyncio
import ctypes
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
from harness import HERE, answer_requests
from rivals.rounds_work import Case, Runs, status_bytes

from minga.federation import transport
from minga.federation.coordinator.authority import Authority
from minga.federation.identity import Identity, Role, make_csr, new_key
from minga.federation.memory import keep_freed_memory

METHOD: Final = "/bare/Rounds"
PIECE_BYTES: Final = 1 << 19


class Server(grpc.GenericRpcHandler):
    """Sends a model to every stream once per round, and adds up what comes back."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._model = bytes(case.model_bytes)
        self._orders: list[asyncio.Queue[None]] = []
        self._done: asyncio.Queue[None] = asyncio.Queue()
        self._sum = np.zeros(case.num_values, np.float32)

    def service(self, handler_call_details: Any) -> Any:
        """Give the one method there is."""
        if handler_call_details.method != METHOD:
            return None
        return grpc.stream_stream_rpc_method_handler(self._stream)

    async def _stream(self, pieces: AsyncIterator[bytes], _context: Any) -> AsyncIterator[bytes]:
        orders: asyncio.Queue[None] = asyncio.Queue()
        self._orders.append(orders)
        self._done.put_nowait(None)
        while True:
            await orders.get()
            for start in range(0, len(self._model), PIECE_BYTES):
                yield self._model[start : start + PIECE_BYTES]
            await self._add(pieces)
            self._done.put_nowait(None)

    async def _add(self, pieces: AsyncIterator[bytes]) -> None:
        start = 0
        while start < self._sum.size:
            values = np.frombuffer(await anext(aiter(pieces)), np.float32)
            self._sum[start : start + values.size] += values
            start += values.size

    async def connected(self) -> None:
        """Wait for all devices."""
        for _ in range(self._case.num_devices):
            await self._done.get()

    async def round(self) -> float:
        """Run one round; gives its seconds."""
        start = time.perf_counter()
        for orders in self._orders:
            orders.put_nowait(None)
        await self.connected()
        return time.perf_counter() - start


async def measure(case: Case, num_rounds: int, folder: Path) -> Runs:
    """Run server and devices for some rounds."""
    authority = Authority.open(folder)
    server_identity = authority.issue_server(["127.0.0.1"])
    service = Server(case)
    server = grpc.aio.server(options=transport.SERVER_OPTIONS)
    server.add_generic_rpc_handlers((service,))
    credentials = transport.mutual_server_credentials(lambda: server_identity)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    devices = [_device(authority, case, port, number) for number in range(case.num_devices)]
    try:
        async with asyncio.timeout(120):
            await service.connected()
        idle = status_bytes("self", "VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        took = [await service.round() for _ in range(num_rounds)]
        peak = status_bytes("self", "VmHWM")
    finally:
        for device in devices:
            device.kill()
            device.wait()
        await server.stop(None)
    return Runs(
        first_s=took[0],
        rounds_s=tuple(took[1:]),
        period_s=sum(took[1:]) / len(took[1:]),
        idle_bytes=idle,
        peak_bytes=peak,
        max_error=0.0,
    )


def _device(authority: Authority, case: Case, port: int, number: int) -> subprocess.Popen[str]:
    key, name = new_key(), f"device-{number}"
    certificate = authority.issue_client(Role.DEVICE, name, make_csr(key, name))
    identity = Identity.of(key, certificate, authority.certificate)
    given = {
        "address": f"127.0.0.1:{port}",
        "model_bytes": case.model_bytes,
        "pem": [
            identity.authority_pem.decode(),
            identity.key_pem().decode(),
            identity.certificate_pem.decode(),
        ],
    }
    device = subprocess.Popen(
        [sys.executable, "-m", "bare_rounds", "device"],
        cwd=HERE,
        stdin=subprocess.PIPE,
        text=True,
    )
    assert device.stdin is not None
    device.stdin.write(json.dumps(given) + "\n")
    device.stdin.flush()
    return device


async def take_part(given: dict[str, Any]) -> None:
    """Be a device, until killed."""
    credentials = grpc.ssl_channel_credentials(*(pem.encode() for pem in given["pem"]))
    options = transport.CHANNEL_OPTIONS
    size = int(given["model_bytes"])
    update = bytes(size)
    async with grpc.aio.secure_channel(given["address"], credentials, options=options) as channel:
        call = channel.stream_stream(METHOD)()
        while True:
            received = 0
            while received < size:
                received += len(await call.read())
            for start in range(0, size, PIECE_BYTES):
                await call.write(update[start : start + PIECE_BYTES])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Measure what is asked for."""
    case = Case(num_devices=request["num_devices"], num_values=request["num_values"])
    with tempfile.TemporaryDirectory() as folder:
        return asdict(asyncio.run(measure(case, request["num_rounds"], Path(folder))))


def leave(number: int, _frame: object) -> None:
    """Leave through all `finally` blocks."""
    sys.exit(128 + number)


if __name__ == "__main__":
    keep_freed_memory()
    signal.signal(signal.SIGTERM, leave)
    if sys.argv[1:] == ["device"]:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the server: prctl(2)
        asyncio.run(take_part(json.loads(sys.stdin.readline())))
    else:
        answer_requests(answer)
