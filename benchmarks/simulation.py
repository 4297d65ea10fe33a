"""Simulated federations: rounds per second of `minga simulate` and of others, for the same work.

1,000 devices that hold scikit-learn's handwritten digits in mixes of their own (Dirichlet, 0.3); in
each of 20 rounds 100 of them train an MLP of 64, 128 and 10 units for one epoch of batches of 16,
by gradient descent at 0.1, and their weighted mean is the next model. Everybody gets the same first
weights, devices, batches and cohorts, so that all have to end with the same accuracy.

- drawn: each device draws 32 examples, with repetition; the case of the targets.
- unequal: the numbers of examples are log-normal around 32, with a deviation of 0.8; without
  Flower, whose rounds take seconds either way.

Sides: Minga in one process, and with two workers on Ray; a loop in torch as one writes it by hand;
Apple's pfl; Flower's simulation engine on its own Ray with as many processes as there are cores.
All but the two that say otherwise use one thread. What is measured begins after the first round, by
when all have loaded what they need, and holds everything that a round takes.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from digits import Digits
from harness import (
    Rival,
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    pinned,
    print_conditions,
    print_table,
    rival_python,
)
from rivals.simulation_work import BATCH_SIZE, Work, pace

from minga.federation.config import FederationConfig
from minga.training import TaskReference
from minga.training.loop import batch_places, epoch_seed
from minga.training.network import build_network
from minga.training.simulation.config import DirichletTable, SimulationConfig
from minga.training.simulation.partition import populate
from minga.training.simulation.simulate import Simulated, Simulation, simulate

SEED: Final = 0
TWO_WORKERS: Final = "ours, 2 workers"
PFL: Final = "pfl==0.6.0"
CASES: Final = {
    "drawn": DirichletTable(devices=1000, alpha=0.3, examples=32),
    "unequal": DirichletTable(devices=1000, alpha=0.3, examples=32, size_spread=0.8),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is done."""

    cases: tuple[str, ...]
    repeats: int
    num_rounds: int
    on_ray: bool = True
    """Whether two workers on Ray are a side as well; they take seconds to start."""


FULL: Final = Scale(cases=("drawn", "unequal"), repeats=5, num_rounds=20)
QUICK: Final = Scale(cases=("drawn",), repeats=1, num_rounds=10)


def simulation_of(case: str, num_rounds: int) -> Simulation:
    """Say what Minga simulates."""
    task = Digits()
    return Simulation(
        task=task,
        splits=task.data(""),
        federation=FederationConfig(num_rounds=num_rounds, cohort=100, protection="plain"),
        config=SimulationConfig(partition=CASES[case], workers=1, measure_every=num_rounds),
        params={},
        seed=SEED,
    )


def work_of(simulation: Simulation, done: Simulated) -> Work:
    """Write down for others what Minga did: devices, the order of their batches, cohorts."""
    splits, task = simulation.splits, simulation.task
    population = populate(task, splits, simulation.config.partition, seed=SEED)
    number_of = {name: number for number, name in enumerate(population.names)}
    network = build_network(task, task.defaults, splits.train, seed=SEED)

    def in_order(own: Any) -> Any:
        places = list(batch_places(len(own), BATCH_SIZE, epoch_seed(SEED, 0)))
        left = np.setdiff1d(np.arange(len(own)), np.concatenate(places))  # a lone last example
        return own[np.concatenate([*places, left])]

    return Work(
        inputs=splits.train.inputs,
        targets=splits.train.targets,
        test_inputs=splits.validation.inputs,
        test_targets=splits.validation.targets,
        devices=[in_order(own) for own in population.train_of],
        cohorts=np.array(
            [[number_of[name] for name in one.survivors] for one in done.campaign.rounds]
        ),
        first=[parameter.detach().numpy() for parameter in network.parameters()],
    )


def run_ours(simulation: Simulation, reference: TaskReference | None = None) -> dict[str, float]:
    """Run all rounds with Minga."""
    stamps: list[float] = []

    def note(_record: object) -> bool:
        stamps.append(time.perf_counter())
        return False

    done = simulate(simulation, reference=reference, on_round=note)
    assert not done.one_by_one, done.one_by_one
    return {"pace": pace(stamps), "accuracy": done.history[-1]["accuracy"]}


def run_case(case: str, scale: Scale, rivals: dict[str, Rival], file: Path) -> dict[str, Any]:
    """Run all sides in turn, so that what else the machine does meets all of them."""
    simulation = simulation_of(case, scale.num_rounds)
    work_of(simulation, simulate(simulation)).save(file)
    sides: dict[str, Callable[[], dict[str, Any]]] = {"ours": lambda: run_ours(simulation)}
    if scale.on_ray:
        two = replace(simulation, config=simulation.config.model_copy(update={"workers": 2}))
        reference = TaskReference(root=Path(__file__).parent, name="digits.py:Digits")
        sides[TWO_WORKERS] = lambda: run_ours(two, reference)
    for name, rival in rivals.items():
        sides[name] = lambda rival=rival: rival.ask({"work": str(file)})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for repeat in range(scale.repeats):
        for name, run in sides.items():
            if repeat and name == TWO_WORKERS:  # to start them takes longer than all rounds
                continue
            print(f"{case}, run {repeat + 1} of {scale.repeats}: {name}", file=sys.stderr)
            runs[name].append(run())
    medians = {
        name: {key: statistics.median(one[key] for one in found) for key in ("pace", "accuracy")}
        for name, found in runs.items()
    }
    return {"case": case, "medians": medians, "runs": runs}


def show(results: list[dict[str, Any]]) -> None:
    """Print rounds per second, and by how much ours are faster."""
    rows: list[list[str]] = []
    for result in results:
        ours = result["medians"]["ours"]["pace"]
        for name, median in result["medians"].items():
            times = f"{ours / median['pace']:.1f}"
            rows.append(
                [result["case"], name, f"{median['pace']:.1f}", f"{median['accuracy']:.4f}", times]
            )
        rows.append([])
    columns = ("case", "side", "rounds/s", "accuracy", "ours is faster by")
    print_table("1,000 devices, 100 a round, MLP 64-128-10", columns, rows[:-1])


def targets_of(result: dict[str, Any]) -> list[Target]:
    """Say what is to be reached, where the rival ran."""
    medians = result["medians"]
    goals = {"flwr": 60, "pfl": 10, "loop": 5}
    targets = [
        Target(
            name=f"simulation_ratio_to_{name}",
            value=medians["ours"]["pace"] / medians[name]["pace"],
            goal=f">={goal}",
        )
        for name, goal in goals.items()
        if name in medians
    ]
    accuracies = [median["accuracy"] for median in medians.values()]
    spread = max(accuracies) - min(accuracies)
    return [*targets, Target(name="simulation_accuracy_spread", value=spread, goal="<=0.005")]


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    scale = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    under = conditions(["minga", "torch", "ray", "numpy"])
    print_conditions(under)
    with ExitStack() as stack:
        stack.enter_context(ending_cleanly())
        if scale.on_ray:
            from minga.cluster.stack import local_ray

            stack.enter_context(local_ray())
        modules = {"loop": (Path(sys.executable), "rivals.bare_simulation")}
        if not options.ours_only:
            flower = pinned("flwr").replace("flwr", "flwr[simulation]")
            python = rival_python(PFL, "torch", "numpy")
            modules["pfl"] = (python, "rivals.pfl_simulation")
            python = rival_python(flower, "torch", "numpy")
            modules["flwr"] = (python, "rivals.flower_simulation")
        rivals = {name: stack.enter_context(Rival(*how)) for name, how in modules.items()}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = []
        for case in scale.cases:
            against = {n: r for n, r in rivals.items() if n != "flwr" or case == "drawn"}
            results.append(run_case(case, scale, against, folder / f"{case}.npz"))
    show(results)
    report = {"conditions": under, "rivals": [PFL, pinned("flwr")], "cases": results}
    conclude(report, targets_of(results[0]), options.json)


if __name__ == "__main__":
    main()
