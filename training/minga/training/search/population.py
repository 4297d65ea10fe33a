"""Population based training (Jaderberg et al., 2017), one generation after the other.

After some epochs each trial of the weakest quarter takes over weights and hyper-parameters of one
of the strongest quarter (*exploit*) and changes the latter a little (*explore*). Generations end
together, so the outcome depends on the seed alone and not on which trial was faster.

Only ranges of floats are changed: other hyper-parameters may decide the network's shape, and
weights fit one shape only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minga.training.search.suggestions import Space, draw
from minga.training.space import LogUniform, Objective, Param, Uniform

QUANTILE = 0.25
FACTORS = (0.8, 1.25)
RESAMPLED = 0.25
"""Share of changed values that are drawn anew instead of scaled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of a generation: `source` is the number whose weights it goes on with."""

    number: int
    source: int
    params: Mapping[str, Param]


def next_generation(
    members: Sequence[Member],
    values: Mapping[int, float],
    *,
    space: Space,
    objective: Objective,
    seed: int,
    generation: int,
) -> list[Member]:
    """Decide with whose weights and with which hyper-parameters each member goes on.

    Args:
        members: of the generation that has ended.
        values: number -> the objective after its last epoch; one that failed is missing.
        space: of the Task.
        objective: what is compared.
        seed: of what is drawn.
        generation: of the members that are returned.
    """
    worst = objective.worst

    def rank(number: int) -> tuple[float, int]:
        value = values.get(number, worst)
        return objective.gain(value if np.isfinite(value) else worst, 0.0), -number

    ranked = sorted((member.number for member in members), key=rank, reverse=True)
    num_replaced = max(1, round(QUANTILE * len(ranked))) if len(ranked) > 1 else 0
    strong, weak = ranked[:num_replaced], set(ranked[len(ranked) - num_replaced :])
    by_number = {member.number: member for member in members}
    successors = []
    for member in members:
        if member.number not in weak:
            successors.append(
                Member(number=member.number, source=member.number, params=member.params)
            )
            continue
        generator = np.random.default_rng([seed, generation, member.number])
        source = by_number[strong[int(generator.integers(len(strong)))]]
        params = _explore(source.params, space, generator)
        successors.append(Member(number=member.number, source=source.number, params=params))
    return successors


def _explore(
    params: Mapping[str, Param], space: Space, generator: np.random.Generator
) -> dict[str, Param]:
    changed = dict(params)
    for name, domain in space.items():
        if not isinstance(domain, Uniform | LogUniform):
            continue
        if generator.random() < RESAMPLED:
            changed[name] = draw({name: domain}, int(generator.integers(2**31)), 0)[name]
        else:
            value = float(params[name]) * FACTORS[int(generator.integers(2))]
            changed[name] = float(min(max(value, domain.low), domain.high))
    return changed
