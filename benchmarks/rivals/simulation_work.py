"""What all sides of `simulation.py` do: devices that train one network, in rounds.

Runs in rivals' environments too: it needs numpy, and torch where a network is trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEARNING_RATE = 0.1
BATCH_SIZE = 16
NUM_HIDDEN = 128
LAYERS = ("0.weight", "0.bias", "2.weight", "2.bias")
"""Names of the network's tensors in torch, and in a `Work`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One simulation: the same devices, batches and cohorts for everybody."""

    inputs: NDArray[np.float32]
    targets: NDArray[np.int64]
    test_inputs: NDArray[np.float32]
    test_targets: NDArray[np.int64]
    devices: list[NDArray[np.int64]]
    """Each device's examples, in the order of its batches."""
    cohorts: NDArray[np.int64]
    """The devices of each round, shape `(num_rounds, cohort)`."""
    first: list[NDArray[np.float32]]
    """The first weights, as `LAYERS`."""

    def save(self, file: Path) -> None:
        """Write it to a file."""
        np.savez(
            file,
            inputs=self.inputs,
            targets=self.targets,
            test_inputs=self.test_inputs,
            test_targets=self.test_targets,
            examples=np.concatenate(self.devices),
            sizes=[len(own) for own in self.devices],
            cohorts=self.cohorts,
            **{f"layer{place}": value for place, value in enumerate(self.first)},
        )

    @classmethod
    def load(cls, file: str) -> "Work":
        """Read what `save` wrote."""
        with np.load(file) as kept:
            return cls(
                inputs=kept["inputs"],
                targets=kept["targets"],
                test_inputs=kept["test_inputs"],
                test_targets=kept["test_targets"],
                devices=np.split(kept["examples"], np.cumsum(kept["sizes"])[:-1]),
                cohorts=kept["cohorts"],
                first=[kept[f"layer{place}"] for place in range(len(LAYERS))],
            )

    def accuracy(self, weights: list[NDArray[np.float32]]) -> float:
        """Measure a network on the test examples."""
        hidden = np.maximum(self.test_inputs @ weights[0].T + weights[1], 0)
        outputs = hidden @ weights[2].T + weights[3]
        return float(np.mean(outputs.argmax(axis=1) == self.test_targets))


def network(weights: list[NDArray[np.float32]]) -> Any:
    """Make the network in torch."""
    import torch
    from torch import nn

    torch.set_num_threads(1)
    made = nn.Sequential(
        nn.Linear(weights[0].shape[1], NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, 10)
    )
    made.load_state_dict({n: torch.from_numpy(w) for n, w in zip(LAYERS, weights, strict=True)})
    return made


def batches(inputs: Any, targets: Any) -> Iterator[tuple[Any, Any]]:
    """Cut one device's examples into its batches; a lone last example is left out, as ours does."""
    for low in range(0, len(inputs), BATCH_SIZE):
        high = min(low + BATCH_SIZE, len(inputs))
        if high - low > 1 or len(inputs) == 1:
            yield inputs[low:high], targets[low:high]


def pace(stamps: list[float]) -> float:
    """Give rounds per second from the moments at which rounds ended; the first round warms up."""
    return (len(stamps) - 1) / (stamps[-1] - stamps[0])
