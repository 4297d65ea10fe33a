"""Data larger than memory: read, described, checked and learned from under a cap.

A Parquet set of the asked size is written in pieces, and worked through by a process whose memory
the kernel caps (RLIMIT_DATA: heap, stacks, private mappings). The peak that is reported is of all
its resident pages, libraries included. Every step walks over all rows: splits, schema, profile,
checks, digest, one epoch of a small network, validated, and the judgement of it: export, metrics,
calibration, slices, noise, gaps, and the comparison with a champion. The set and what was made of
it are removed at the end.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import (
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    forget_peak,
    print_conditions,
    print_table,
    resident_peak,
)

GB: Final = 10**9
NUM_COLUMNS: Final = 24
PIECE_ROWS: Final = 200_000
ROW_BYTES: Final = (NUM_COLUMNS + 1) * 8
COLUMNS: Final = tuple(f"x{index}" for index in range(NUM_COLUMNS))
BATCH_SIZE: Final = 8192


def write_set(folder: Path, gigabytes: float) -> float:
    """Write readings of which the first columns decide the target; give the size in GB."""
    generator = np.random.default_rng(0)
    num_pieces = -(-int(gigabytes * GB) // (ROW_BYTES * PIECE_ROWS))
    folder.mkdir(parents=True)
    for piece in range(num_pieces):
        inputs = generator.normal(size=(PIECE_ROWS, NUM_COLUMNS))
        targets = (inputs[:, :4].sum(axis=1) > 0).astype(np.float64)
        columns = dict(zip(COLUMNS, inputs.T, strict=True)) | {"target": targets}
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        file = folder / f"{piece:05}.parquet"
        pq.write_table(table, file, compression="none", use_dictionary=False)
    return sum(file.stat().st_size for file in folder.iterdir()) / GB


def work(source: Path, folder: Path, cap_gb: float) -> dict[str, Any]:
    """Work through the set under the cap; give seconds by step, the peak, and what was learned."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(cap_gb * GB), int(cap_gb * GB)))
    from learning_from_disk import Readings

    from minga.training.candidate import Champion, assess
    from minga.training.config import DataConfig, GateConfig
    from minga.training.data import check, digest_of, profile_of, stored_splits
    from minga.training.export import to_onnx
    from minga.training.loop import Learner, fit
    from minga.training.network import build_network

    seconds: dict[str, float] = {}
    peaks_gb = {"import": resident_peak() / GB}

    def timed(step: str, do: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        forget_peak()
        done = do()
        seconds[step] = round(time.perf_counter() - start, 2)
        peaks_gb[step] = round(resident_peak() / GB, 3)
        return done

    task = Readings()
    splits = timed(
        "split onto the disk",
        lambda: stored_splits(str(source), columns=COLUMNS, target="target", folder=folder),
    )
    schema = timed("schema", lambda: task.schema(splits.train))
    profile = timed("profile", lambda: profile_of(task, splits.train))
    config = DataConfig(source=str(source))
    found = timed("check", lambda: check(splits, schema, profile, config))
    timed("digest", lambda: digest_of(splits))
    params = {"lr": 0.01, "batch_size": BATCH_SIZE}
    learner = Learner(task, build_network(task, params, splits.train, seed=0), params)
    history = timed(
        "train one epoch",
        lambda: fit(learner, splits.train, epochs=1, seed=0, validation=splits.validation),
    )
    # By its first weights a network is a champion that is easily beaten.
    first = to_onnx(build_network(task, params, splits.train, seed=1), splits.test.inputs[:1])
    judged = timed(
        "judge",
        lambda: assess(
            task,
            learner.network,
            splits.test,
            schema=schema,
            profile=profile,
            champion=Champion(version=1, onnx=first, schema=schema),
            config=GateConfig(),
            seed=0,
        ),
    )
    return {
        "seconds": seconds,
        "peaks_gb": peaks_gb,
        "peak_gb": max(peaks_gb.values()),
        "violations": [str(item) for item in found],
        "num_examples": len(splits.train) + len(splits.validation) + len(splits.test),
        "accuracy": history[-1]["accuracy"],
        "gates": {gate.name: gate.passed for gate in judged.report.gates},
    }


def measure(gigabytes: float, cap_gb: float, folder: Path) -> dict[str, Any]:
    """Write the set, work through it in another process, and remove it."""
    source, splits = folder / "set", folder / "splits"
    try:
        start = time.perf_counter()
        source_gb = write_set(source, gigabytes)
        print(f"{source_gb:.2f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        words = ("--work", source, "--folder", splits, "--cap", str(cap_gb))
        done = subprocess.run(
            [sys.executable, __file__, *words],
            check=False,
            capture_output=True,
            text=True,
            # Arrow's own allocator reserves 1 GB of addresses, which the cap counts as used.
            env={**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"},
        )
        if done.returncode:
            sys.exit(f"the set was not worked through under {cap_gb} GB:\n{done.stderr}")
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(splits, ignore_errors=True)
    return {"source_gb": source_gb, "cap_gb": cap_gb, **figures}


def show(figures: Mapping[str, Any]) -> None:
    """Print seconds by step."""
    rows = [
        (
            step,
            f"{spent:.1f}",
            f"{figures['source_gb'] / spent:.2f}" if spent else "-",
            f"{figures['peaks_gb'][step]:.2f}",
        )
        for step, spent in figures["seconds"].items()
    ]
    print_table(
        f"{figures['source_gb']:.1f} GB of Parquet, {figures['num_examples']:,} rows, under "
        f"{figures['cap_gb']} GB; peak {figures['peak_gb']:.2f} GB, "
        f"accuracy {figures['accuracy']:.3f}",
        ("step", "s", "GB/s of the set", "peak GB"),
        rows,
    )


def main() -> None:
    """Measure and report."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--gigabytes", type=float, help="size of the set; 10, or 1 with --quick")
    parser.add_argument("--cap", type=float, help="memory in GB; 2, or 0.85 with --quick")
    parser.add_argument("--folder", type=Path, help="where the set lies meanwhile")
    parser.add_argument("--work", type=Path, help="work through this set under --cap and stop")
    asked = parser.parse_args()
    if asked.work:
        print(json.dumps(work(asked.work, asked.folder, asked.cap)))
        return
    gigabytes = asked.gigabytes or (1.0 if asked.quick else 10.0)
    cap_gb = asked.cap or (0.85 if asked.quick else 2.0)
    under = conditions(("pyarrow", "numpy", "torch"))
    print_conditions(under)
    with ending_cleanly(), tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        figures = measure(gigabytes, cap_gb, Path(folder))
    show(figures)
    target = Target(name="data_peak_gb", value=figures["peak_gb"], goal=f"<= {cap_gb:g}")
    conclude({"conditions": under, **figures}, [target], asked.json)


if __name__ == "__main__":
    main()
