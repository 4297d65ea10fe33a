"""Whether a round is work enough for several processes.

To divide a round costs time in itself: the model goes out, and all devices' updates come back
through Ray's object store. Small networks are trained before that is done.
"""

import copy
from typing import Final

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minga.training.simulation.partition import Population

OPERATIONS_PER_S: Final = 30e9
"""What one core comes to in training, calls and memory included (AMD EPYC, 2026-11-23: 182 million
in 5.5 ms)."""

CALL_S: Final = 0.003
"""To ask workers and to hear from them takes so long, with next to nothing to train (likewise)."""

BYTES_PER_S: Final = 0.6e9
"""So fast do updates come back (likewise: 3.8 MB in 6 ms)."""

COUNTED_EXAMPLES: Final = 2
"""So many go through the network to count; some layers do not take a single one."""

PASSES: Final = 3
"""A step takes about three times the operations of a forward pass: as many for the gradients at
the inputs of layers, and as many for those of weights."""


def operations_of_round(
    network: nn.Module, population: Population, *, cohort: int, epochs: int
) -> float:
    """Say how many floating-point operations the training of a round takes, about.

    Args:
        network: what devices train.
        population: who they are.
        cohort: how many train in a round.
        epochs: how often each goes through its examples.
    """
    count = min(COUNTED_EXAMPLES, len(population.train))
    some = torch.from_numpy(population.train.inputs[np.arange(count)])
    counted = copy.deepcopy(network).cpu().eval()  # it draws nothing then, and keeps no statistics
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(some)
    each: float = counter.get_total_flops() / count
    examples = float(np.mean([len(own) for own in population.train_of])) * cohort * epochs
    return PASSES * each * examples


def is_worth_dividing(operations: float, update_bytes: float) -> bool:
    """Tell whether half of a round's training takes longer than to ask two workers for it.

    Args:
        operations: of the whole training.
        update_bytes: of all devices' updates.
    """
    return operations / 2 / OPERATIONS_PER_S > CALL_S + update_bytes / BYTES_PER_S
