"""What Ray Train, Ray Tune and Minga cost beside a plain torch loop that does the same work.

Three processes train in turns, one epoch each: a plain loop, Minga's loop, and Ray Train's worker
(see `turns`). So only one of them works at a time, and the machine's pace, which changes by a tenth
within minutes, meets all three. Epochs are timed in the process that trains, from the end of one
validation to the end of the next, so that checkpoints and reports count. A ratio is the median of
those of single turns. A search runs one trial at a time and cuts none.
`minga run` is the whole path. The data is ai4i2020 of `../shared/data`, or what `--data` names, or
a made set of its shape where that is absent.
"""

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from harness import (
    ROOT,
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    print_conditions,
    print_table,
)
from turns import Umpire

HERE: Final = Path(__file__).parent
DATA: Final = ROOT.parent / "shared" / "data" / "ai4i2020.csv.gz"
SEED: Final = 7
REFUSED: Final = 15
"""The exit code of `minga run` if a gate refuses the model: ten epochs need not make a good one."""

LOOP: Final = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from overhead import loop_side
loop_side(*sys.argv[2:4], json.loads(sys.argv[4]), int(sys.argv[5]))
"""

PROJECT: Final = """
task = "overhead_task.py:MachineFailure"
seed = 7

[data]
source = "{source}"

[search]
num_trials = 8
max_epochs = 8

[training]
num_workers = 1
epochs = 10

[gates]
max_latency_ms = 50
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network, and how long it is trained."""

    name: str
    params: dict[str, Any]
    epochs: int


CASES: Final = (
    Case(name="64 hidden", params={"hidden": 64}, epochs=100),
    Case(name="2 x 512 hidden", params={"hidden": 512, "layers": 2}, epochs=24),
    # Epochs as long as those of real work, while the others show what each costs at least.
    Case(
        name="2 x 512 in small batches",
        params={"hidden": 512, "layers": 2, "batch_size": 8},
        epochs=16,
    ),
)


PLAIN_SIDE: Final = "plain"
LOOP_SIDE: Final = "loop"
TRAIN_SIDE: Final = "train"
SIDES: Final = (PLAIN_SIDE, LOOP_SIDE, TRAIN_SIDE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Seconds of one case: medians of an epoch, and what comes before and around them."""

    case: str
    plain_epoch_s: float
    loop_epoch_s: float
    train_epoch_s: float
    loop_ratio: float
    train_ratio: float
    """Medians over the turns of a side's epoch by the plain loop's."""
    train_mean_ratio: float
    """Of all epochs together: one that is much longer than the others counts here."""
    train_start_s: float
    train_end_s: float
    tune_trial_s: float
    tune_start_s: float
    plain_trial_s: float


def measure(source: str, case: Case, scratch: Path) -> Result:
    """Run all of them; Ray must be running."""
    from minga.training import TaskReference

    reference = TaskReference(root=HERE, name="overhead_task.py:MachineFailure")
    task = reference.load()
    splits = task.data(source)
    turns, start_s, end_s = in_turns(reference, task, source, case, scratch)
    tune_start_s, tune_trial_s = tune_trials(reference, task, splits, case, scratch)
    epoch_s = {side: statistics.median(turn[side] for turn in turns) for side in SIDES}
    total_s = {side: sum(turn[side] for turn in turns) for side in SIDES}
    ratios = {
        side: statistics.median(turn[side] / turn[PLAIN_SIDE] for turn in turns) for side in SIDES
    }
    return Result(
        case=case.name,
        plain_epoch_s=epoch_s[PLAIN_SIDE],
        loop_epoch_s=epoch_s[LOOP_SIDE],
        train_epoch_s=epoch_s[TRAIN_SIDE],
        loop_ratio=ratios[LOOP_SIDE],
        train_ratio=ratios[TRAIN_SIDE],
        train_mean_ratio=total_s[TRAIN_SIDE] / total_s[PLAIN_SIDE],
        train_start_s=start_s,
        train_end_s=end_s,
        tune_trial_s=tune_trial_s,
        tune_start_s=tune_start_s,
        plain_trial_s=epoch_s[PLAIN_SIDE] * TRIAL_EPOCHS,
    )


TRIAL_EPOCHS: Final = 4
NUM_TRIALS: Final = 8

WARM_UP: Final = 2
"""Turns that are not counted; before them each side has trained one epoch by itself."""


def in_turns(
    reference: Any, task: Any, source: str, case: Case, scratch: Path
) -> tuple[list[dict[str, float]], float, float]:
    """Time the epochs of all sides, and what Ray Train takes before and after its own."""
    umpire = Umpire(scratch)
    num_turns = case.epochs + WARM_UP

    def params_of(side: str) -> dict[str, Any]:
        return {**task.defaults, **case.params, "turns": umpire.address, "side": side}

    def loop(side: str) -> None:
        words = [str(HERE), side, source, json.dumps(params_of(side)), str(num_turns + 1)]
        subprocess.run([sys.executable, "-c", LOOP, *words], check=True)

    def under_ray() -> tuple[float, float]:
        from minga.training.config import TrainConfig
        from minga.training.train import train

        start = time.time()
        train(
            reference,
            task,
            task.data(source),
            params_of(TRAIN_SIDE),
            config=TrainConfig(num_workers=1, epochs=num_turns + 1),
            seed=SEED,
            folder=scratch / f"train-{case.name.replace(' ', '-')}",
        )
        return start, time.time()

    with ThreadPoolExecutor() as pool:
        loops = [pool.submit(loop, side) for side in (PLAIN_SIDE, LOOP_SIDE)]
        turns = pool.submit(umpire.play, SIDES, num_turns)
        start, end = under_ray()  # Ray Train listens to signals, so it needs the main thread
        played = turns.result()
        for side in loops:
            side.result()
    return (
        played[WARM_UP:],
        umpire.ready_at[TRAIN_SIDE] - start,
        end - umpire.ended_at[TRAIN_SIDE],
    )


def loop_side(side: str, source: str, params: dict[str, Any], epochs: int) -> None:
    """Train by the plain loop or by Minga's, in a process of its own."""
    from overhead_task import MachineFailure, plain_loop

    from minga.training.loop import Learner, fit
    from minga.training.network import build_network

    task = MachineFailure()
    splits = task.data(source)
    if side == PLAIN_SIDE:
        plain_loop(task, splits, params, epochs=epochs, seed=1)
        return
    learner = Learner(task, build_network(task, params, splits.train, seed=SEED), params)
    fit(learner, splits.train, epochs=epochs, seed=1, validation=splits.validation)


def tune_trials(
    reference: Any, task: Any, splits: Any, case: Case, scratch: Path
) -> tuple[float, float]:
    """Time Ray Tune: until the first epoch, and a trial once it is running."""
    from minga.training.config import SearchConfig
    from minga.training.search.tuning import search

    times = scratch / f"tune-{case.name}.times"
    task.defaults = {**task.defaults, **case.params, "times": str(times)}
    task.search_space = {**task.search_space, **_only({**case.params, "times": str(times)})}
    start = time.time()
    search(
        reference,
        task,
        splits,
        config=SearchConfig(
            num_trials=NUM_TRIALS, max_epochs=TRIAL_EPOCHS, max_concurrent=1, scheduler="none"
        ),
        seed=SEED,
        folder=scratch / f"tune-{case.name.replace(' ', '-')}",
    )
    ended = [float(line) for line in times.read_text(encoding="ascii").splitlines()]
    ends = ended[TRIAL_EPOCHS - 1 :: TRIAL_EPOCHS]
    return ended[0] - start, statistics.median(_differences(ends))


def _only(params: dict[str, Any]) -> dict[str, Any]:
    """Fix hyper-parameters by a space of one value each: that is how they reach the trials."""
    from minga.training import choice

    return {name: choice([value]) for name, value in params.items()}


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def whole_path(source: str, scratch: Path) -> dict[str, float]:
    """Time `minga run` in a new project: its steps, and all of the process."""
    project = scratch / "plant"
    project.mkdir()
    (project / "overhead_task.py").write_bytes((HERE / "overhead_task.py").read_bytes())
    (project / "minga.toml").write_text(PROJECT.format(source=source), encoding="utf-8")
    command = [sys.executable, "-m", "minga.cli", "run", "--project", str(project), "--json"]
    start = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode not in (0, REFUSED):
        sys.exit(f"minga run failed:\n{done.stderr}")
    return {**json.loads(done.stdout)["seconds"], "whole": round(seconds, 2)}


def print_results(results: list[Result], ray_s: float) -> None:
    """Print what each layer costs."""
    rows = [
        [
            result.case,
            f"{1e3 * result.plain_epoch_s:.1f}",
            f"{1e3 * result.loop_epoch_s:.1f} ({result.loop_ratio:.3f})",
            f"{1e3 * result.train_epoch_s:.1f} ({result.train_ratio:.3f})",
            f"{result.train_mean_ratio:.3f}",
            f"{result.train_start_s:.1f} + {result.train_end_s:.1f}",
            f"{1e3 * (result.tune_trial_s - result.plain_trial_s):.0f}",
            f"{result.tune_start_s:.1f}",
        ]
        for result in results
    ]
    columns = ("network", "plain ms/epoch", "loop (ratio)", "Ray Train (ratio)", "of sums")
    more = ("Train start + end s", "Tune ms/trial over plain", "Tune start s")
    print_table("One worker, one thread; medians", (*columns, *more), rows)
    print(f"Ray starts in {ray_s:.1f} s.", flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="ai4i2020.csv.gz")
    names = [case.name for case in CASES]
    parser.add_argument("--case", choices=names, default="", help="this network alone")
    options = parser.parse_args()
    source = str(options.data.absolute()) if options.data.exists() else "made"
    cases = [case for case in CASES if options.case in ("", case.name)]
    cases = cases[:1] if options.quick else cases
    under = conditions(["ray", "torch", "mlflow"])
    print_conditions(under)
    with ending_cleanly(), tempfile.TemporaryDirectory() as folder:
        from minga.cluster.stack import local_ray

        start = time.perf_counter()
        with local_ray():
            ray_s = time.perf_counter() - start
            results = [measure(source, case, Path(folder)) for case in cases]
        print_results(results, ray_s)
        path = whole_path(source, Path(folder))
    print(f"minga run: {', '.join(f'{name} {value:.1f} s' for name, value in path.items())}")
    report = {
        "benchmark": "overhead",
        "quick": options.quick,
        "conditions": under,
        "data": Path(source).name,
        "ray_start_s": ray_s,
        "cases": [asdict(result) for result in results],
        "minga_run_s": path,
    }
    targets = [
        Target(
            name=f"overhead.train_epoch[{result.case}]".replace(" ", "-"),
            value=result.train_ratio,
            goal="<=1.05",
        )
        for result in results
    ]
    conclude(report, targets, options.json)


if __name__ == "__main__":
    main()
