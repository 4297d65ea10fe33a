"""What computing waiting requests together brings: one row per request, callers in closed loops.

A network that takes milliseconds (1024-4096-4096-1000; `--quick` takes a smaller one) on one
thread of onnxruntime, asked by 1, 16 and 64 callers who each wait for their answer, with batches
of up to 64 rows and without batches, in turn. The limit is onnxruntime alone at the same number
of rows. No wire is in it: this is the batcher and what it costs.
"""

import asyncio
import hashlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
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

from minga.inference.batching import Batcher
from minga.inference.engine import ModelRef, OnnxModel

MAX_ROWS: Final = 64
CALLERS: Final = (1, 16, 64)
NUM_REPEATS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    widths: tuple[int, ...]
    seconds: float


FULL: Final = Scale(widths=(1024, 4096, 4096, 1000), seconds=5)
QUICK: Final = Scale(widths=(256, 1024, 1024, 100), seconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What callers got."""

    rows_per_s: float
    p50_ms: float
    p99_ms: float


def load(scale: Scale) -> OnnxModel:
    """Load the network as a server does."""
    content = network(scale.widths)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        path.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        return OnnxModel.load(ModelRef(name="network", version="1", path=str(path), sha256=digest))


async def ask(model: OnnxModel, num_callers: int, max_rows: int, seconds: float) -> Run:
    """Let callers ask for a time, each for one row again and again."""
    durations: list[float] = []
    row = {"input": np.zeros((1, model.inputs[0].shape[1]), np.float32)}
    with ThreadPoolExecutor(1) as threads:
        batcher = Batcher(threads, num_threads=1, max_rows=max_rows)
        start = time.perf_counter()

        async def call() -> None:
            while (begun := time.perf_counter()) < start + seconds:
                await batcher.run(model, row, ())
                durations.append(time.perf_counter() - begun)

        await asyncio.gather(*(call() for _ in range(num_callers)))
        elapsed = time.perf_counter() - start
    ordered = sorted(durations)
    return Run(
        rows_per_s=len(ordered) / elapsed,
        p50_ms=1e3 * ordered[len(ordered) // 2],
        p99_ms=1e3 * ordered[int(len(ordered) * 0.99)],
    )


def alone(model: OnnxModel, num_rows: int, seconds: float) -> float:
    """Give the rows per second of onnxruntime by itself."""
    rows = {"input": np.zeros((num_rows, model.inputs[0].shape[1]), np.float32)}
    start = time.perf_counter()
    num_runs = 0
    while time.perf_counter() < start + seconds:
        model.compute(rows, ("output",))
        num_runs += 1
    return num_rows * num_runs / (time.perf_counter() - start)


def measure(model: OnnxModel, num_callers: int, seconds: float) -> dict[str, Any]:
    """Measure one number of callers, in turn with and without batches and onnxruntime alone."""
    runs: dict[str, list[Run]] = {"batched": [], "single": []}
    limit: list[float] = []
    for _ in range(NUM_REPEATS):
        for name, max_rows in (("batched", MAX_ROWS), ("single", 1)):
            runs[name].append(asyncio.run(ask(model, num_callers, max_rows, seconds)))
        limit.append(alone(model, num_callers, seconds))
    print(".", end="", file=sys.stderr, flush=True)
    return {
        "callers": num_callers,
        "runs": {name: [asdict(run) for run in many] for name, many in runs.items()},
        "medians": {
            name: {
                field: statistics.median(getattr(run, field) for run in many)
                for field in ("rows_per_s", "p50_ms", "p99_ms")
            }
            for name, many in runs.items()
        },
        "limit_rows_per_s": statistics.median(limit),
    }


def print_cases(cases: Sequence[dict[str, Any]]) -> None:
    """Print two rows for each number of callers."""
    rows: list[list[str]] = []
    for case in cases:
        for name in ("batched", "single"):
            median = case["medians"][name]
            rows.append(
                [
                    str(case["callers"]),
                    name,
                    f"{median['rows_per_s']:,.0f}",
                    f"{median['p50_ms']:.1f}",
                    f"{median['p99_ms']:.1f}",
                    f"{median['rows_per_s'] / case['limit_rows_per_s']:.2f}",
                ]
            )
        rows.append([])
    columns = ("callers", "requests", "rows/s", "p50 ms", "p99 ms", "of onnxruntime alone")
    print_table("Requests of one row on one thread, medians", columns, rows)


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    scale = QUICK if options.quick else FULL
    under = conditions(["numpy", "onnxruntime"])
    print_conditions(under)
    with ending_cleanly():
        model = load(scale)
        cases = [measure(model, num_callers, scale.seconds) for num_callers in CALLERS]
    print(file=sys.stderr)
    print_cases(cases)
    lone, crowd = (
        {name: one["rows_per_s"] for name, one in case["medians"].items()}
        for case in (cases[0], cases[-1])
    )
    limit = cases[-1]["limit_rows_per_s"]
    values = {
        "lone_ratio": (lone["batched"] / lone["single"], ">=0.9"),
        "crowd_ratio": (crowd["batched"] / crowd["single"], ">=4"),
        "crowd_to_limit": (crowd["batched"] / limit, ">=0.9"),
    }
    targets = [
        Target(name=f"batching.{name}", value=value, goal=goal)
        for name, (value, goal) in values.items()
    ]
    report = {"benchmark": "batching", "quick": options.quick, "conditions": under, "cases": cases}
    conclude(report, targets, options.json)


if __name__ == "__main__":
    main()
