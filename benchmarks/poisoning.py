"""What liars do to a model under each rule, and what secrecy in groups costs.

Twenty simulated devices learn scikit-learn's handwritten digits together with a softmax regression;
each holds mostly few of the ten digits. A fifth of them lies, the same ones throughout:

- flipped: sends its update with the sign turned around;
- scaled: the same, ten times as long;
- labels: trains in earnest, on labels that are all one further;
- little: all liars send the mean of the others' updates less 1.5 standard deviations in each
  coordinate, which stays within what honest updates could be (Baruch et al., NeurIPS 2019).

Rules see the updates of single devices (plain rounds), or the means of groups of two or four drawn
anew each round (secure rounds, of which the coordinator learns a sum per group). Then a lie spoils
its whole group: the more devices hide each other, the fewer groups are clean. Rules that are told
how many may lie are told the worst case, as far as they can bear it.

There is no rival: the table shows what holds and what does not.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from minga.federation.aggregation.combination import combine
from minga.federation.aggregation.contributions import VectorContribution
from minga.federation.aggregation.rules import (
    Clip,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    Rule,
    TrimmedMean,
)

NUM_DEVICES: Final = 20
NUM_LIARS: Final = 4
LARGE: Final = ("flipped", "scaled")
"""Lies that robust rules are held against."""
ATTACKS: Final = ("nobody", *LARGE, "labels", "little")
GROUP_SIZES: Final = (1, 2, 4)
RULES: Final = (
    "mean",
    "mean, clipped",
    "median",
    "trimmed mean",
    "Krum",
    "multi-Krum",
    "geometric median",
)
ROBUST: Final = ("median", "trimmed mean", "multi-Krum", "geometric median")
NUM_CLASSES: Final = 10
LITTLE: Final = 1.5

Vector = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is done."""

    num_rounds: int
    seeds: tuple[int, ...]
    attacks: tuple[str, ...]


FULL: Final = Scale(num_rounds=40, seeds=(0, 1, 2, 3, 4), attacks=ATTACKS)
QUICK: Final = Scale(num_rounds=15, seeds=(0,), attacks=("nobody", *LARGE))


# -- the learning problem --


@dataclass(frozen=True, slots=True)
class Data:
    """Images, shape `(n, 65)` with a last column of ones, and their digits, shape `(n,)`."""

    images: NDArray[np.float64]
    digits: NDArray[np.int64]


def split(seed: int) -> tuple[list[Data], Data]:
    """Give each device its images, mostly of few digits, and a fifth of all for the test."""
    random = np.random.default_rng(seed)
    digits = load_digits()
    order = random.permutation(len(digits.target))
    images = np.column_stack([digits.data / 16, np.ones(len(digits.target))])[order]
    target = digits.target[order]
    num_test = len(target) // 5
    shares = random.dirichlet(np.full(NUM_DEVICES, 1.0), size=NUM_CLASSES)
    owner = np.array([random.choice(NUM_DEVICES, p=shares[digit]) for digit in target])
    owner[random.permutation(len(owner))[: 5 * NUM_DEVICES]] = np.repeat(range(NUM_DEVICES), 5)
    owner[:num_test] = -1
    devices = [Data(images[owner == name], target[owner == name]) for name in range(NUM_DEVICES)]
    return devices, Data(images[:num_test], target[:num_test])


def train(model: Vector, data: Data, steps: int = 5, rate: float = 0.5) -> Vector:
    """Take steps of gradient descent on a device's data; gives what changed."""
    weights = model.reshape(-1, NUM_CLASSES).astype(np.float64)
    wanted = np.eye(NUM_CLASSES)[data.digits]
    for _ in range(steps):
        scores = data.images @ weights
        chances = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        weights -= rate * data.images.T @ (chances - wanted) / len(wanted)
    return (weights.ravel() - model).astype(np.float32)


def accuracy(model: Vector, data: Data) -> float:
    """Give the share of images that are recognised."""
    scores = data.images @ model.reshape(-1, NUM_CLASSES)
    return float((scores.argmax(axis=1) == data.digits).mean())


# -- lies --


def updates_of(model: Vector, devices: Sequence[Data], attack: str) -> list[Vector]:
    """Give what the devices send; the first ones lie."""
    updates = [train(model, data) for data in devices]
    for liar in range(NUM_LIARS):
        match attack:
            case "flipped":
                updates[liar] = -updates[liar]
            case "scaled":
                updates[liar] = -10 * updates[liar]
            case "labels":
                data = devices[liar]
                wrong = Data(data.images, (data.digits + 1) % NUM_CLASSES)
                updates[liar] = train(model, wrong)
            case "little":
                honest = np.array(updates[NUM_LIARS:])
                updates[liar] = honest.mean(axis=0) - LITTLE * honest.std(axis=0)
            case _:
                pass
    return updates


# -- rules --


def rule_of(name: str, num_contributions: int) -> Rule:
    """Make a rule that is told of the worst case: each liar in another contribution."""
    worst = NUM_LIARS / num_contributions
    share = min(worst, ((num_contributions - 1) // 2) / num_contributions)
    krum_share = min(worst, ((num_contributions - 3) // 2) / num_contributions)
    rules: dict[str, Rule] = {
        "mean": Mean(),
        "mean, clipped": Mean(clip=Clip()),
        "median": Median(),
        "trimmed mean": TrimmedMean(liar_share=share),
        "Krum": Krum(liar_share=krum_share),
        "multi-Krum": MultiKrum(liar_share=krum_share),
        "geometric median": GeometricMedian(),
    }
    return rules[name]


def learn(name: str, attack: str, group_size: int, seed: int, num_rounds: int) -> float:
    """Learn for some rounds; gives the accuracy at the end."""
    devices, test = split(seed)
    random = np.random.default_rng(seed)
    rule = rule_of(name, NUM_DEVICES // group_size)
    model = np.zeros(65 * NUM_CLASSES, np.float32)
    mean = np.empty_like(model)
    for _ in range(num_rounds):
        updates = np.array(updates_of(model, devices, attack))
        groups = random.permutation(NUM_DEVICES).reshape(-1, group_size)
        sums = [
            VectorContribution(name=str(group), values=updates[group].mean(axis=0), weight=1)
            for group in groups
        ]
        combine(rule, sums, mean)
        model = model + mean
    return accuracy(model, test)


# -- what comes out --


def measure(scale: Scale) -> list[dict[str, Any]]:
    """Learn with every rule, attack and group size, with each seed."""
    cases = []
    for group_size in GROUP_SIZES:
        for name in RULES:
            for attack in scale.attacks:
                runs = [
                    learn(name, attack, group_size, seed, scale.num_rounds) for seed in scale.seeds
                ]
                median = statistics.median(runs)
                case = {"rule": name, "attack": attack, "group_size": group_size}
                cases.append({**case, "accuracy": median, "runs": runs})
    return cases


def tell(cases: Sequence[dict[str, Any]], attacks: Sequence[str]) -> None:
    """Print a table for each group size."""
    found = {(c["group_size"], c["rule"], c["attack"]): c["accuracy"] for c in cases}
    for group_size in GROUP_SIZES:
        title = (
            "single updates (plain rounds)"
            if group_size == 1
            else f"means of groups of {group_size} (secure rounds)"
        )
        rows = [
            [name, *(f"{100 * found[group_size, name, attack]:.1f} %" for attack in attacks)]
            for name in RULES
        ]
        print_table(f"Accuracy, {title}", ["rule", *attacks], rows)


def targets_of(cases: Sequence[dict[str, Any]]) -> list[Target]:
    """Hold the losses against what is to be: robust rules lose little, the mean all."""
    found = {(c["group_size"], c["rule"], c["attack"]): c["accuracy"] for c in cases}
    base = found[1, "mean", "nobody"]
    loss = {name: max(base - found[1, name, attack] for attack in LARGE) for name in RULES}
    return [
        Target(name="poisoning_loss_of_the_mean", value=loss["mean"], goal=">=0.3"),
        *(
            Target(
                name=f"poisoning_loss_of_{name.lower().replace(' ', '_')}",
                value=loss[name],
                goal="<=0.1",
            )
            for name in ROBUST
        ),
    ]


def main() -> int:
    """Measure, print, and write what was asked for."""
    asked = arguments(__doc__ or "").parse_args()
    scale = QUICK if asked.quick else FULL
    with ending_cleanly():
        under = conditions(["numpy", "scikit-learn"])
        cases = measure(scale)
    print_conditions(under)
    print(f"{NUM_LIARS} of {NUM_DEVICES} devices lie, {scale.num_rounds} rounds, ", end="")
    print(f"median of {len(scale.seeds)} seeds")
    tell(cases, scale.attacks)
    conclude({"conditions": under, "cases": cases}, targets_of(cases), asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
