"""Whether a round is work enough for several processes.

To divide a round among processes costs time in itself, whatever there is to train: the model goes
out, the devices' updates come back, and who waits for whom is arranged. Small networks' rounds are
done before that is.
"""

from typing import Final

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minga.training.simulation.partition import Population

PAYS_FROM: Final = 2e9
"""Operations of a round from which on two processes are faster than one; `docs/explanation/
simulation.md` has the figures."""

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
    some = torch.from_numpy(population.train.inputs[:COUNTED_EXAMPLES].copy())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(some)
    each = counter.get_total_flops() / len(some)
    examples = float(np.mean([len(own) for own in population.train_of])) * cohort * epochs
    return PASSES * each * examples
