"""Reference results: four federated methods on the handwritten digits of 539 writers.

MNIST's digits, each on the device of who wrote it (the writers are QMNIST's); 20 of 539 writers
train in a round, an MLP of 784, 64 and 10 units, five epochs of batches of 20 by gradient descent
at 0.1. Accuracy is measured on MNIST's test digits, of other writers. FedProx's pull and FedAdam's
learning rate are chosen from three each, by another seed than those shown.

    benchmarks/reference_results.py                           # measure, print
    benchmarks/reference_results.py --write docs/explanation  # and write the page

It needs `mnist_train_0.npz` and its companions in `../shared/data`, or in the folder of `--data`.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from digits import WRITERS_TEST, Writers
from harness import (
    ROOT,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    print_conditions,
    print_table,
)

from minga.federation.config import FederationConfig
from minga.training import Splits
from minga.training.simulation.config import ColumnTable, SimulationConfig
from minga.training.simulation.simulate import Simulation, simulate

DATA: Final = ROOT.parent / "shared" / "data"
SEEDS: Final = (1, 2, 3)
CHOOSING_SEED: Final = 100
NUM_ROUNDS: Final = 60
SHOWN: Final = (5, 10, 20, 40, 60)
GOAL: Final = 0.92
"""Rounds until this accuracy are counted."""
PAGE: Final = "reference-results"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method, and what is to be chosen of it."""

    name: str
    tables: tuple[tuple[str, dict[str, Any]], ...]
    """Settings of `[federation]` by the value that is chosen; one has nothing to choose."""


METHODS: Final = (
    Method(name="FedAvg", tables=(("", {}),)),
    Method(
        name="FedProx",
        tables=tuple((f"mu {mu:g}", {"training": {"proximal_mu": mu}}) for mu in (0.01, 0.1, 1.0)),
    ),
    Method(name="SCAFFOLD", tables=(("", {"scaffold": True}),)),
    Method(
        name="FedAdam",
        tables=tuple(
            (f"rate {rate:g}", {"server_optimizer": {"name": "fedadam", "learning_rate": rate}})
            for rate in (0.003, 0.01, 0.03)
        ),
    ),
)


def play(splits: Splits, table: dict[str, Any], seed: int, num_rounds: int) -> list[float]:
    """Give the accuracy after each round."""
    values = {"num_rounds": num_rounds, "cohort": 20, "protection": "plain", **table}
    values["training"] = {"epochs": 5, **table.get("training", {})}
    done = simulate(
        Simulation(
            task=Writers(),
            splits=splits,
            federation=FederationConfig.model_validate(values),
            config=SimulationConfig(partition=ColumnTable(), workers=1),
            params={},
            seed=seed,
        )
    )
    assert done.num_devices == 539
    return [record["accuracy"] for record in done.history]


def choose(method: Method, splits: Splits, num_rounds: int) -> tuple[str, dict[str, Any]]:
    """Give the settings with the best accuracy over the last rounds, under a seed of its own."""
    if len(method.tables) == 1:
        return method.tables[0]
    found = []
    for label, table in method.tables:
        curve = play(splits, table, CHOOSING_SEED, num_rounds)
        found.append((statistics.mean(curve[-5:]), label, table))
        print(f"{method.name}, {label}: {found[-1][0]:.4f}", file=sys.stderr)
    _, label, table = max(found, key=lambda entry: entry[0])
    return label, table


def rounds_to(curve: list[float], goal: float) -> int | None:
    """Give the first round after which the accuracy is reached; None if it never is."""
    return next((number for number, value in enumerate(curve, 1) if value >= goal), None)


def rows_of(results: list[dict[str, Any]]) -> list[list[str]]:
    """Give the table: mean and deviation over seeds after some rounds, rounds to the goal."""
    rows = []
    for result in results:
        curves = np.array(result["curves"])
        cells = [
            f"{curves[:, number - 1].mean():.4f} ± {curves[:, number - 1].std(ddof=1):.4f}"
            for number in SHOWN
            if number <= curves.shape[1]
        ]
        reached = [rounds_to(curve, GOAL) for curve in result["curves"]]
        times = ", ".join("-" if number is None else str(number) for number in reached)
        rows.append([result["method"], result["chosen"] or "-", *cells, times])
    return rows


def columns_of(num_rounds: int) -> list[str]:
    """Give the table's columns."""
    shown = [f"round {number}" for number in SHOWN if number <= num_rounds]
    return ["method", "chosen", *shown, f"rounds to {GOAL}"]


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Draw accuracy by round: the mean of the seeds, and from the least to the most of them."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "minga", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for result in results:
        curves = np.array(result["curves"])
        rounds = np.arange(1, curves.shape[1] + 1)
        (line,) = axes.plot(rounds, curves.mean(axis=0), label=result["method"], linewidth=1.4)
        low, high = curves.min(axis=0), curves.max(axis=0)
        axes.fill_between(rounds, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set(xlabel="round", ylabel="accuracy on the test digits", ylim=(0.7, 1.0))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file, bbox_inches="tight", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Measure, print, and write the page's table and picture."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder with MNIST's writers")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write table and picture")
    options = parser.parse_args()
    if not (options.data / WRITERS_TEST).exists():
        parser.error(f"{options.data} has no {WRITERS_TEST}; name its folder with --data")
    num_rounds, seeds = (10, SEEDS[:2]) if options.quick else (NUM_ROUNDS, SEEDS)
    torch.set_num_threads(1)
    under = conditions(["minga", "torch", "numpy"])
    print_conditions(under)
    with ending_cleanly():
        splits = Writers().data(str(options.data))
        results = []
        for method in METHODS:
            label, table = choose(method, splits, num_rounds // 2)
            curves = []
            for seed in seeds:
                curves.append(play(splits, table, seed, num_rounds))
                print(f"{method.name}, seed {seed}: {curves[-1][-1]:.4f}", file=sys.stderr)
            results.append({"method": method.name, "chosen": label, "curves": curves})
    columns, rows = columns_of(num_rounds), rows_of(results)
    print_table("accuracy, mean ± deviation over seeds", columns, rows)
    if options.write:
        lines = [columns, ["---"] * len(columns), *rows]
        table_text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
        _replace_table(options.write / f"{PAGE}.md", table_text)
        draw(results, options.write / f"{PAGE}.svg")
    conclude({"conditions": under, "results": results}, [], options.json)


def _replace_table(page: Path, table: str) -> None:
    """Put the table where the page has one."""
    before, start, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, end, after = rest.partition("<!-- end of table -->")
    page.write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
