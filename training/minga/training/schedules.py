"""Learning-rate schedules: how far the optimiser's rate is from its own in each step.

Warm-up is linear (Goyal et al., "Accurate, large minibatch SGD", 2017); `cosine` falls along half
a cosine to zero (Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5 without restarts), `linear`
in a straight line.
"""

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from minga.training.errors import TaskError
from minga.training.space import Params

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,  # noqa: ARG005 - one signature for all
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
}
"""Name -> the share of the rate that is left when a share of the steps is done."""


def schedule_of(
    optimiser: torch.optim.Optimizer, params: Params, num_steps: int
) -> LRScheduler | None:
    """Make the schedule that the hyper-parameters ask for; None if the rate stays as it is.

    Args:
        optimiser: whose rates are scaled.
        params: `schedule`, one of `SHAPES` (constant), and `warmup`, the share of all steps in
            which the rate rises from near zero (0).
        num_steps: of the whole training.

    Raises:
        TaskError: there is no such schedule, or `warmup` is no share below 1.
    """
    name, warmup = str(params.get("schedule", "constant")), float(params.get("warmup", 0.0))
    if name not in SHAPES:
        raise TaskError(f"schedule = {name!r} is unknown; use {', '.join(SHAPES)}")
    if not 0 <= warmup < 1:
        raise TaskError(f"warmup = {warmup} is no share of the steps; use 0 or more, below 1")
    if name == "constant" and warmup == 0:
        return None
    num_warm = round(warmup * num_steps)
    num_rest = max(1, num_steps - num_warm)

    def factor(step: int) -> float:
        if step < num_warm:
            return (step + 1) / num_warm
        return SHAPES[name](min(1.0, (step - num_warm) / num_rest))

    return LambdaLR(optimiser, factor)
