"""Requests per second of one model behind ours and other servers, over HTTP and gRPC.

A small network (64-128-10, some microseconds, so that the server is measured) and a big one
(1024-4096-4096-1000, milliseconds, so that batching is), asked for one row at a time by 1, 16 and
64 callers. Each server runs alone, one process or replica, onnxruntime on one thread, in an
environment of its own; all take turns, and medians over the turns are compared. Ours has its
monitor on, and after each case it is made sure that the rows were watched. The limit is what
Python allows: starlette on uvicorn, and a bare grpc.aio server.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
from harness import (
    HERE,
    RivalError,
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    print_conditions,
    print_table,
)
from networks import network
from serving_load import Run, over_grpc, over_http, require_clients
from serving_servers import (
    OWN,
    RIVALS,
    WIRES,
    Network,
    Server,
    environments,
    request_of,
    running,
    wait_for_answer,
)
from serving_watched import Watching

MEMORY: Final = """
import hashlib, json, sys
from pathlib import Path
import psutil
from minga.inference.engine import ModelRef
from minga.inference.repository import ModelRepository

file = Path(sys.argv[1])
digest = hashlib.sha256(file.read_bytes()).hexdigest()
repository, used = ModelRepository(), []
for count in range(1, 5):
    repository.apply(
        ModelRef(name=f"net-{one}", version="1", path=str(file), sha256=digest)
        for one in range(count)
    )
    used.append(psutil.Process().memory_full_info().uss)
print(json.dumps((used[-1] - used[0]) / 3))
"""
"""Gives the memory of one more model in a process that has one, in bytes."""
THROUGHPUT: Final = """
import json, sys, time
import numpy as np
from rivals.serve_work import session

network, best = session(), 0.0
for size in map(int, sys.argv[2:]):
    rows = np.zeros((size, network.get_inputs()[0].shape[1]), np.float32)
    network.run(None, {"input": rows})
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < float(sys.argv[1]):
        network.run(None, {"input": rows})
        count += size
    best = max(best, count / elapsed)
print(json.dumps(best))
"""
"""Gives the rows per second of onnxruntime alone on one thread, at the best batch size."""

WARM_UP_S: Final = 1
MAX_BATCH: Final = 64
BATCH_SIZES: Final = (1, 16, 32, 64, 128, 256)
OURS: Final = {"minga": "local", "minga on Ray": "ray"}
"""What targets call them."""
LIMITS: Final = {"json": "bare starlette", "binary": "bare starlette", "grpc": "bare grpc.aio"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    networks: tuple[Network, ...]
    callers: tuple[int, ...]
    seconds: int
    num_repeats: int


SMALL: Final = Network(name="small", widths=(64, 128, 10), max_batch=1)
BIG: Final = Network(name="big", widths=(1024, 4096, 4096, 1000), max_batch=MAX_BATCH)
FULL: Final = Scale(networks=(SMALL, BIG), callers=(1, 16, 64), seconds=3, num_repeats=3)
QUICK: Final = Scale(networks=(SMALL,), callers=(16,), seconds=1, num_repeats=1)


def measure(
    server: Server, python: Path, served: Network, file: Path, scale: Scale
) -> dict[tuple[str, int], Run]:
    """Start a server, ask it over each wire with each number of callers, and end it."""
    row = np.random.default_rng(2).normal(size=(1, served.widths[0])).astype(np.float32)
    expected = expected_of(file, row)
    runs: dict[tuple[str, int], Run] = {}
    watching = Watching(file, served.widths[0]) if server.name in OURS else None
    with running(server, python, served, file) as place:
        wait_for_answer(place, server, row, expected)
        for wire in server.wires:
            ask = over_grpc if wire == "grpc" else over_http
            request, port = request_of(server, wire, row), place.port(wire)
            for num_callers in scale.callers:
                for seconds in (WARM_UP_S, scale.seconds):
                    run = ask(
                        place.process, port, request, num_callers=num_callers, seconds=seconds
                    )
                runs[wire, num_callers] = run
                if watching is not None:
                    watching.expect(int(run.requests_per_s * scale.seconds))
    print(".", end="", file=sys.stderr, flush=True)
    return runs


def expected_of(file: Path, row: np.ndarray) -> list[float]:
    """Compute the right answer."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return [float(number) for number in session.run(None, {"input": row})[0].ravel()]


def ask_python(code: str, *words: str, file: Path) -> float:
    """Run code in a process of its own, and read the number that it prints."""
    environment = os.environ | {"MINGA_BENCH_MODEL": str(file)}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(
        command, check=True, cwd=HERE, env=environment, capture_output=True, text=True
    )
    return float(orjson.loads(done.stdout))


Runs = dict[tuple[str, str, int], list[Run]]
"""By server, wire and callers."""


def measure_network(
    served: Network, servers: Sequence[Server], pythons: Mapping[str, Path], scale: Scale
) -> dict[str, Any]:
    """Measure all servers in turn, several times over."""
    runs: Runs = {}
    limits: list[float] = []
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="minga-serving-") as folder:
        file = Path(folder) / f"{served.name}.onnx"
        file.write_bytes(network(served.widths))
        for _ in range(scale.num_repeats):
            for server in servers:
                if server.name in failures:
                    continue
                try:
                    found = measure(server, pythons[server.name], served, file, scale)
                except RivalError as error:
                    if server in OWN:
                        raise
                    failures[server.name] = str(error)
                    print(f"{server.name} is left out: {error}", file=sys.stderr)
                    continue
                for (wire, num_callers), run in found.items():
                    runs.setdefault((server.name, wire, num_callers), []).append(run)
            sizes = map(str, BATCH_SIZES)
            limits.append(ask_python(THROUGHPUT, f"{scale.seconds / 3:g}", *sizes, file=file))
        model_bytes = file.stat().st_size
        memory = ask_python(MEMORY, str(file), file=file)
    return {
        "network": asdict(served),
        "runs": runs,
        "failures": failures,
        "limit_rows_per_s": statistics.median(limits),
        "memory_per_model": memory / model_bytes,
    }


def medians(runs: Runs) -> dict[tuple[str, str, int], Run]:
    """Take the median of each figure over the turns."""
    return {
        key: Run(
            **{
                field: statistics.median(getattr(run, field) for run in many)
                for field in Run.__dataclass_fields__
            }
        )
        for key, many in runs.items()
    }


def print_network(case: Mapping[str, Any], scale: Scale) -> None:
    """Print a row for each server and wire, and a line for each number of callers."""
    found = medians(case["runs"])
    rows: list[list[str]] = []
    for wire in WIRES:
        names = dict.fromkeys(name for name, other, _ in found if other == wire)
        for name in names:
            cells = [name, wire]
            for num_callers in scale.callers:
                run = found[name, wire, num_callers]
                cells += [
                    f"{run.requests_per_s:,.0f}",
                    f"{run.p50_ms:.2f} / {run.p99_ms:.1f}",
                    f"{run.cpu_us:,.0f}",
                ]
            rows.append(cells)
        rows.append([])
    columns = ["server", "wire"]
    for num_callers in scale.callers:
        columns += [f"{num_callers}: req/s", "p50 / p99 ms", "CPU us"]
    widths = "-".join(map(str, case["network"]["widths"]))
    print_table(f"{widths}, requests of one row by callers, medians", columns, rows)


Goals = dict[str, tuple[float, str]]
"""By a target's name its value, and what it is to be."""


def targets_of(cases: Sequence[Mapping[str, Any]]) -> list[Target]:
    """Compare with what is to be reached, as far as it was measured."""
    values: Goals = {}
    for case in cases:
        found = medians(case["runs"])
        if case["network"]["name"] == "big":
            values |= big_goals(found, case["limit_rows_per_s"])
            values["memory_per_model"] = (case["memory_per_model"], "<=1.25")
        else:
            for name, ours_is in OURS.items():
                if (name, "json", 16) in found:
                    values |= small_goals(found, name, ours_is)
    return [
        Target(name=f"serving.{name}", value=value, goal=goal)
        for name, (value, goal) in values.items()
    ]


def big_goals(found: Mapping[tuple[str, str, int], Run], limit_rows_per_s: float) -> Goals:
    """Compare our throughput, where callers are many, with onnxruntime's own at its best batch."""
    return {
        f"big_{OURS[name]}_{wire}_to_onnxruntime_{num_callers}_callers": (
            run.requests_per_s / limit_rows_per_s,
            ">=0.95",
        )
        for (name, wire, num_callers), run in found.items()
        if name in OURS and num_callers >= MAX_BATCH
    }


def small_goals(found: Mapping[tuple[str, str, int], Run], name: str, ours_is: str) -> Goals:
    """Compare one of ours with the bare servers and with the peers, at 16 callers."""
    values: Goals = {}
    for wire, said in (("json", "http"), ("grpc", "grpc")):
        ours = found[name, wire, 16]
        bare = found[LIMITS[wire], wire, 16]
        values[f"{ours_is}_{said}_to_bare"] = (ours.requests_per_s / bare.requests_per_s, ">=0.4")
        peers = {
            server.name: found[server.name, wire, 16]
            for server in RIVALS
            if (server.name, wire, 16) in found
        }
        if not peers:
            continue
        if wire == "json":
            fastest = max(run.requests_per_s for run in peers.values())
            values[f"{ours_is}_http_to_best_peer"] = (ours.requests_per_s / fastest, ">=2.5")
        else:
            for peer, run in peers.items():
                ratio = ours.requests_per_s / run.requests_per_s
                values[f"{ours_is}_grpc_to_{peer.lower()}"] = (ratio, ">=1")
        soonest_ms = min(run.p99_ms for run in peers.values())
        values[f"{ours_is}_{said}_p99_to_best_peer"] = (ours.p99_ms / soonest_ms, "<=1")
    return values


def as_json(case: Mapping[str, Any]) -> dict[str, Any]:
    """Give what goes into the report, every single run included."""
    found = medians(case["runs"])
    rows = [
        {
            "server": name,
            "wire": wire,
            "callers": num_callers,
            "median": asdict(found[name, wire, num_callers]),
            "runs": [asdict(run) for run in many],
        }
        for (name, wire, num_callers), many in case["runs"].items()
    ]
    return {**case, "runs": rows}


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    names = [server.name for server in (*OWN, *RIVALS)]
    parser.add_argument("--server", action="append", choices=names, help="only this, and others")
    parser.add_argument("--network", choices=["small", "big"], help="this one alone")
    parser.add_argument("--callers", type=int, action="append", help="only so many, and others")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    if options.network:
        scale = replace(scale, networks=(SMALL if options.network == "small" else BIG,))
    if options.callers:
        scale = replace(scale, callers=tuple(options.callers))
    require_clients()
    wanted = OWN if options.ours_only else (*OWN, *RIVALS)
    if options.server:
        needed = {*options.server, *(server.name for server in OWN)}
        wanted = tuple(server for server in wanted if server.name in needed)
    under = conditions(["onnxruntime", "uvicorn", "uvloop", "grpcio", "ray"])
    print_conditions(under)
    with ending_cleanly():
        pythons = environments(wanted)
        servers = [server for server in wanted if server.name in pythons]
        cases = [measure_network(one, servers, pythons, scale) for one in scale.networks]
    print(file=sys.stderr)
    for case in cases:
        print_network(case, scale)
    report = {
        "benchmark": "serving",
        "quick": options.quick,
        "conditions": under | {"load_average_at_the_end": os.getloadavg()},
        "cases": [as_json(case) for case in cases],
    }
    conclude(report, targets_of(cases), options.json)


if __name__ == "__main__":
    main()
