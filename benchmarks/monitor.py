"""What watching costs the server that is watched: processor time and requests per second.

A network of 64-128-10 answers one row of JSON at a time to 16 callers, over HTTP, from a server in
a process of its own: with the monitor and without it in turn. Its 64 inputs and 10 outputs are all
watched, windows are judged and kept on the disk meanwhile. Processor time is that of the server's
process, the monitor's thread in it included. That thread's own share of it is told too: unlike the
comparison of two runs it holds on a busy machine.
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
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

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
from onnx import TensorProto, helper, numpy_helper

from minga.inference.app import InferenceApp
from minga.inference.engine import ModelRef
from minga.inference.monitor.keeper import Keeper
from minga.inference.monitor.observer import Observer
from minga.inference.monitor.reference import METADATA_KEY
from minga.inference.repository import ModelRepository
from minga.inference.server import Server
from minga.training.profile import profile_columns

WIDTHS: Final = (64, 128, 10)
NUM_CALLERS: Final = 16
NUM_ROWS: Final = 5000


def network(generator: np.random.Generator) -> bytes:
    """Build the network, with a reference of its inputs and outputs inside."""
    nodes, weights, last = [], [], "input"
    values = generator.normal(size=(NUM_ROWS, WIDTHS[0])).astype(np.float32)
    inputs = values
    for layer, (wide, narrow) in enumerate(pairwise(WIDTHS)):
        matrix = generator.normal(0, wide**-0.5, (wide, narrow)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        is_last = layer == len(WIDTHS) - 2
        product = "output" if is_last else f"product{layer}"
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [product]))
        values = values @ matrix
        if not is_last:
            last = f"hidden{layer}"
            nodes.append(helper.make_node("Relu", [product], [last]))
            values = np.maximum(values, 0)
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("input", WIDTHS[0]), ("output", WIDTHS[-1]))
    ]
    graph = helper.make_graph(nodes, "network", infos[:1], infos[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {METADATA_KEY: json.dumps(reference(inputs, values))})
    content: bytes = model.SerializeToString()
    return content


def reference(inputs: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
    """Describe inputs and outputs as training does."""
    columns = [
        {
            "role": role,
            "name": profile.name,
            "edges": profile.edges,
            "shares": profile.shares,
            "num_examples": NUM_ROWS,
            "mean": profile.mean,
            "deviation": profile.deviation,
        }
        for role, table in (("input", inputs), ("output", outputs))
        for profile in profile_columns(table)
    ]
    outliers = {"threshold": 1.3, "share": 0.01}
    return {"layout": 1, "num_held_out": NUM_ROWS, "columns": columns, "outliers": outliers}


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
                parent.send([observed.rows, observed.dropped, _thread_s("minga-monitor")])

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


def measure(folder: Path, seconds: float, *, with_monitor: bool) -> dict[str, float]:
    """Measure one server for a time, after a warm-up."""
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve, args=(folder, with_monitor, theirs))
    process.start()
    try:
        port = ours.recv()
        warm = asyncio.run(load(port, seconds / 5))
        before = _processor_s(process.pid)
        start = time.perf_counter()
        answers = asyncio.run(load(port, seconds))
        elapsed = time.perf_counter() - start
        time.sleep(1.2)  # the monitor counts what is left, at the cost of this run
        spent = _processor_s(process.pid) - before
        ours.send("end")
        rows, dropped, watching = ours.recv() if with_monitor else (0, 0, 0.0)
        process.join(20)
    finally:
        process.kill()
        process.join()
    assert not with_monitor or rows == answers + warm, "every row was counted"
    return {
        "answers_per_s": answers / elapsed,
        "processor_us": 1e6 * spent / answers,
        "rows": rows,
        "dropped": dropped,
        "monitor_us": 1e6 * watching / (answers + warm),
    }


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
    seconds, repeats = (2.0, 3) if options.quick else (8.0, 7)
    under = conditions(["numpy", "onnxruntime", "uvicorn"])
    print_conditions(under)
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    with ending_cleanly(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "network.onnx").write_bytes(network(np.random.default_rng(1)))
        for _ in range(repeats):
            for name, many in runs.items():
                many.append(measure(folder, seconds, with_monitor=name == "with"))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    medians = {
        name: {
            field: statistics.median(run[field] for run in many)
            for field in ("answers_per_s", "processor_us", "monitor_us")
        }
        for name, many in runs.items()
    }
    rows = [
        [
            f"{name} monitor",
            f"{one['answers_per_s']:,.0f}",
            f"{one['processor_us']:.1f}",
            f"{one['monitor_us']:.1f}",
        ]
        for name, one in medians.items()
    ]
    columns = ("server", "requests/s", "processor time a request, us", "of it the monitor's")
    print_table("One row of 64 numbers in JSON, 16 callers, medians", columns, rows)
    cost = medians["with"]["processor_us"] / medians["without"]["processor_us"] - 1
    slower = 1 - medians["with"]["answers_per_s"] / medians["without"]["answers_per_s"]
    targets = [
        Target(
            name="monitor.thread_share",
            value=medians["with"]["monitor_us"] / medians["with"]["processor_us"],
            goal="<=0.05",
        ),
        Target(name="monitor.processor_share", value=cost, goal="<=0.05"),
        Target(name="monitor.throughput_share", value=slower, goal="<=0.05"),
    ]
    report = {
        "benchmark": "monitor",
        "quick": options.quick,
        "conditions": under,
        "runs": runs,
        "medians": medians,
    }
    conclude(report, targets, options.json)


if __name__ == "__main__":
    main()
