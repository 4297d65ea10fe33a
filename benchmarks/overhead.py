"""What Ray Train, Ray Tune and Minga cost beside a plain torch loop that does the same work.

Epochs are timed in the process that trains, from the end of one validation to the end of the next,
so that checkpoints and reports count; their mean is shown. The plain loop runs before and after
each of the others, in a process of its own. A search runs one trial at a time and cuts none.
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

HERE: Final = Path(__file__).parent
DATA: Final = ROOT.parent / "shared" / "data" / "ai4i2020.csv.gz"
SEED: Final = 7
REFUSED: Final = 15
"""The exit code of `minga run` if a gate refuses the model: ten epochs need not make a good one."""

PLAIN: Final = """
import json, sys
sys.path.insert(0, sys.argv[1])
from overhead_task import MachineFailure, plain_loop
task = MachineFailure()
params = {**task.defaults, **json.loads(sys.argv[3])}
splits = task.data(sys.argv[2])
plain_loop(task, splits, params, epochs=2, seed=1)
print(json.dumps(plain_loop(task, splits, params, epochs=int(sys.argv[4]), seed=1)))
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
    Case(name="64 hidden", params={"hidden": 64}, epochs=150),
    Case(name="2 x 512 hidden", params={"hidden": 512, "layers": 2}, epochs=24),
    # Epochs as long as those of real work, while the others show what each costs at least.
    Case(
        name="2 x 512 in small batches",
        params={"hidden": 512, "layers": 2, "batch_size": 8},
        epochs=8,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Seconds of one case: means of an epoch, and what comes before and around them."""

    case: str
    plain_epoch_s: float
    loop_epoch_s: float
    train_epoch_s: float
    train_start_s: float
    train_end_s: float
    tune_trial_s: float
    tune_start_s: float
    plain_trial_s: float


def plain(source: str, case: Case) -> list[float]:
    """Time the epochs of the plain loop in a fresh process."""
    words = [PLAIN, str(HERE), source, json.dumps(case.params), str(case.epochs)]
    out = subprocess.run([sys.executable, "-c", *words], check=True, capture_output=True, text=True)
    return list(json.loads(out.stdout))


def measure(source: str, case: Case, scratch: Path) -> Result:
    """Run all of them; Ray must be running."""
    from minga.training import TaskReference

    reference = TaskReference(root=HERE, name="overhead_task.py:MachineFailure")
    task = reference.load()
    splits = task.data(source)
    before = plain(source, case)
    loop = loop_epochs(task, splits, case)
    between = plain(source, case)
    start_s, epochs, end_s = train_epochs(reference, task, splits, case, scratch)
    after = plain(source, case)
    tune_start_s, tune_trial_s = tune_trials(reference, task, splits, case, scratch)
    plain_epoch_s = statistics.fmean(before + between + after)
    return Result(
        case=case.name,
        plain_epoch_s=plain_epoch_s,
        loop_epoch_s=statistics.fmean(loop),
        train_epoch_s=statistics.fmean(epochs),
        train_start_s=start_s,
        train_end_s=end_s,
        tune_trial_s=tune_trial_s,
        tune_start_s=tune_start_s,
        plain_trial_s=plain_epoch_s * TRIAL_EPOCHS,
    )


TRIAL_EPOCHS: Final = 4
NUM_TRIALS: Final = 8


def loop_epochs(task: Any, splits: Any, case: Case) -> list[float]:
    """Time the epochs of Minga's loop alone, in this process."""
    from minga.training.loop import Learner, fit
    from minga.training.network import build_network

    params = {**task.defaults, **case.params}
    times = [time.perf_counter()]

    def note(_: Any) -> bool:
        times.append(time.perf_counter())
        return False

    learner = Learner(task, build_network(task, params, splits.train, seed=SEED), params)
    epochs = case.epochs + 2
    fit(learner, splits.train, epochs=epochs, seed=1, validation=splits.validation, on_epoch=note)
    return _differences(times)[2:]


def train_epochs(
    reference: Any, task: Any, splits: Any, case: Case, scratch: Path
) -> tuple[float, list[float], float]:
    """Time Ray Train with one worker: until the first epoch, its epochs, and what follows them."""
    from minga.training.config import TrainConfig
    from minga.training.train import train

    times = scratch / f"train-{case.name}.times"
    start = time.time()
    train(
        reference,
        task,
        splits,
        {**task.defaults, **case.params, "times": str(times)},
        config=TrainConfig(num_workers=1, epochs=case.epochs + 2),
        seed=SEED,
        folder=scratch / f"train-{case.name.replace(' ', '-')}",
    )
    end = time.time()
    ended = [float(line) for line in times.read_text(encoding="ascii").splitlines()]
    return ended[0] - start, _differences(ended)[1:], end - ended[-1]


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
            f"{1e3 * result.loop_epoch_s:.1f} ({result.loop_epoch_s / result.plain_epoch_s:.3f})",
            f"{1e3 * result.train_epoch_s:.1f} ({result.train_epoch_s / result.plain_epoch_s:.3f})",
            f"{result.train_start_s:.1f} + {result.train_end_s:.1f}",
            f"{1e3 * (result.tune_trial_s - result.plain_trial_s):.0f}",
            f"{result.tune_start_s:.1f}",
        ]
        for result in results
    ]
    columns = ("network", "plain ms/epoch", "loop (ratio)", "Ray Train (ratio)")
    more = ("Train start + end s", "Tune ms/trial over plain", "Tune start s")
    print_table("One worker, one thread; means", (*columns, *more), rows)
    print(f"Ray starts in {ray_s:.1f} s.", flush=True)


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="ai4i2020.csv.gz")
    options = parser.parse_args()
    source = str(options.data.absolute()) if options.data.exists() else "made"
    cases = CASES[:1] if options.quick else CASES
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
            value=result.train_epoch_s / result.plain_epoch_s,
            goal="<=1.05",
        )
        for result in results
    ]
    conclude(report, targets, options.json)


if __name__ == "__main__":
    main()
