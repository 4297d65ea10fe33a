"""A trainer whose update is known beforehand, so that a secure sum can be checked exactly."""

import time
from collections.abc import Mapping

import numpy as np

from minga.federation.parameters import Parameters
from minga.federation.trainer import LocalTrainer, Scalar, Update


class ConstantTrainer:
    """Moves every coordinate by `step` and claims `num_examples` examples.

    `spoil` says what is wrong with its update: `shapes`, or `names` of tensors.
    """

    def __init__(
        self, step: float, num_examples: int, delay_s: float, fail: str, spoil: str
    ) -> None:
        self.step = step
        self.num_examples = num_examples
        self.delay_s = delay_s
        self.fail = fail
        self.spoil = spoil

    def fit(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Update:
        """Take `delay_s` and give the constant update."""
        if self.fail:
            raise ValueError(self.fail)
        print("noise on stdout must not break the frames")  # noqa: T201
        time.sleep(self.delay_s)
        delta = {name: np.full_like(value, self.step) for name, value in parameters.items()}
        if self.spoil == "shapes":
            delta = {name: value[:-1] for name, value in delta.items()}
        if self.spoil == "names":
            delta = {f"{name}.weight": value for name, value in delta.items()}
        return Update(delta=delta, num_examples=self.num_examples, metrics={"step": self.step})

    def evaluate(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Mapping[str, float]:
        """Give the mean of all values."""
        total = sum(float(value.sum()) for value in parameters.values())
        return {"sum": total}


def make(options: Mapping[str, Scalar]) -> LocalTrainer:
    """Make a trainer from a device's options."""
    return ConstantTrainer(
        step=float(options.get("step", 0.5)),
        num_examples=int(options.get("num_examples", 10)),
        delay_s=float(options.get("delay_s", 0.0)),
        fail=str(options.get("fail", "")),
        spoil=str(options.get("spoil", "")),
    )
