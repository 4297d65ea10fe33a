"""What watching costs the server that is watched: processor time and requests per second.

A network of 64-128-10 answers one row of JSON at a time to 16 callers, over HTTP, from a server in
a process of its own. Its 64 inputs and 10 outputs are all watched, windows are judged and kept on
the disk meanwhile. Processor time is that of the server's process, the monitor's thread in it
included. Two servers run, one with the monitor and one without, and are asked in turn, some seconds
each: what a machine can do changes within a minute by more than is measured here, so only a turn
and the next are compared, and the median over such pairs is told. The monitor's thread's own share
is told too: it holds on a busy machine as well.
"""

import asyncio
import hashlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import psutil
from harness import (
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    print_conditions,
    print_table,
)
from networks import network

from minga.inference.app import InferenceApp
from minga.inference.engine import ModelRef
from minga.inference.monitor.keeper import Keeper
from minga.inference.monitor.observer import Observer
from minga.inference.repository import ModelRepository
from minga.inference.server import Server

WIDTHS: Final = (64, 128, 10)
NUM_CALLERS: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    seconds: float
    num_pairs: int


FULL: Final = Scale(seconds=3, num_pairs=20)
QUICK: Final = Scale(seconds=1, num_pairs=4)


def serve(folder: Path, with_monitor: bool, parent: Connection) -> None:
    """Be the server, until the parent says so."""

    async def run() -> None:
        repository = ModelRepository()
        path = folder / "network.onnx"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        repository.apply([ModelRef(name="network", version="1", path=str(path), sha256=digest)])
        with ExitStack() as stack:
            observer = None
            if with_monitor:
                keeper = stack.enter_context(Keeper(folder / "monitor", on_alarm=lambda _: None))
                observer = stack.enter_context(Observer(keeper))
            async with Server(InferenceApp(repository, observer=observer), port=0) as server:
                parent.send(server.port)
                await asyncio.to_thread(parent.recv)
            if observer is not None:
                await asyncio.sleep(1.2)  # until what is left has been counted
                observed = observer.observed
                watched = observed.rows + observed.skipped
                parent.send([watched, _thread_s("minga-monitor")])

    asyncio.run(run())


def request() -> bytes:
    """Write one request as it goes over the wire."""
    row = np.random.default_rng(2).normal(size=WIDTHS[0]).round(4).tolist()
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, WIDTHS[0]], "data": row}
    body = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST /v2/models/network/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def load(port: int, seconds: float) -> int:
    """Let callers ask for a time, each again and again; give how many answers came."""
    message = request()
    end = time.perf_counter() + seconds
    counts = [0] * NUM_CALLERS

    async def call(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = next(
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length")
            )
            await reader.readexactly(length)
            counts[number] += 1
        writer.close()

    await asyncio.gather(*(call(number) for number in range(NUM_CALLERS)))
    return sum(counts)


class Served:
    """A server in a process of its own; a context manager."""

    def __init__(self, folder: Path, *, with_monitor: bool) -> None:
        self._ours, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder, with_monitor, theirs)
        )
        self._with_monitor = with_monitor
        self._answers = 0

    def __enter__(self) -> Self:
        self._process.start()
        self._port = self._ours.recv()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def turn(self, seconds: float) -> dict[str, float]:
        """Ask for a time; give answers per second and processor time an answer, us."""
        before = _processor_s(self._process.pid)
        start = time.perf_counter()
        answers = asyncio.run(load(self._port, seconds))
        elapsed = time.perf_counter() - start
        time.sleep(1.2)  # the monitor counts what is left, at the cost of this turn
        self._answers += answers
        spent = _processor_s(self._process.pid) - before
        return {"answers_per_s": answers / elapsed, "processor_us": 1e6 * spent / answers}

    def end(self) -> float:
        """Stop; give the processor time of the monitor's thread for one answer, us."""
        self._ours.send("end")
        watched, watching = self._ours.recv() if self._with_monitor else (self._answers, 0.0)
        self._process.join(20)
        assert watched == self._answers, "no row was lost"
        return 1e6 * watching / self._answers


def measure(folder: Path, scale: Scale) -> tuple[list[dict[str, Any]], float]:
    """Ask both servers in turn; give the turns of each pair, and the monitor's thread's us."""
    with Served(folder, with_monitor=False) as bare, Served(folder, with_monitor=True) as watched:
        servers = {"without": bare, "with": watched}
        for server in servers.values():
            server.turn(scale.seconds / 2)
        turns = []
        for pair in range(scale.num_pairs):
            # Whoever is second is asked while the machine is warm: that changes too.
            names = list(servers) if pair % 2 else list(reversed(servers))
            turns.append({name: servers[name].turn(scale.seconds) for name in names})
            print(".", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        bare.end()
        return turns, watched.end()


def _thread_s(name: str) -> float:
    """Give the processor time of a thread of this process."""
    wanted = next(thread for thread in threading.enumerate() if thread.name == name)
    times = next(one for one in psutil.Process().threads() if one.id == wanted.native_id)
    return float(times.user_time + times.system_time)


def _processor_s(pid: int | None) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    scale = QUICK if options.quick else FULL
    under = conditions(["numpy", "onnxruntime", "uvicorn"])
    print_conditions(under)
    with ending_cleanly(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "network.onnx").write_bytes(network(WIDTHS))
        turns, watching = measure(folder, scale)

    def median(name: str, field: str) -> float:
        return statistics.median(pair[name][field] for pair in turns)

    def ratio(field: str) -> float:
        return statistics.median(pair["with"][field] / pair["without"][field] for pair in turns)

    rows = [
        [
            f"{name} monitor",
            f"{median(name, 'answers_per_s'):,.0f}",
            f"{median(name, 'processor_us'):.1f}",
            f"{own:.1f}",
        ]
        for name, own in (("without", 0.0), ("with", watching))
    ]
    columns = ("server", "requests/s", "processor time a request, us", "of it the monitor's")
    print_table("One row of 64 numbers in JSON, 16 callers, medians", columns, rows)
    share = watching / median("with", "processor_us")
    targets = [
        Target(name="monitor.thread_share", value=share, goal="<=0.05"),
        Target(name="monitor.processor_share", value=ratio("processor_us") - 1, goal="<=0.05"),
        Target(name="monitor.throughput_share", value=1 - ratio("answers_per_s"), goal="<=0.05"),
    ]
    report = {
        "benchmark": "monitor",
        "quick": options.quick,
        "conditions": under,
        "turns": turns,
        "monitor_us": watching,
    }
    conclude(report, targets, options.json)


if __name__ == "__main__":
    main()
