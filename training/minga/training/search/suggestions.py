"""What is tried next. Each suggestion is a function of the seed, the number and what is known.

So an interrupted search suggests what it would have suggested. Random draws and grids depend on
the number alone. TPE (Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS
2011, in Optuna's implementation) learns from the trials that have ended: with several at a time
its suggestions depend on which those are.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minga.training.errors import TaskError
from minga.training.space import (
    Choice,
    Domain,
    LogUniform,
    Objective,
    Param,
    Params,
    RandInt,
    Uniform,
)

Space = Mapping[str, Domain]

MIN_STARTUP = 4
"""TPE draws at random until so many trials have ended, and at most a quarter of all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A trial that TPE learns from; `value` is None while it runs."""

    params: Params
    value: float | None


def draw(space: Space, seed: int, number: int) -> dict[str, Param]:
    """Draw a point at random."""
    generator = np.random.default_rng([seed, number])
    return {name: _draw(domain, generator) for name, domain in space.items()}


def grid(space: Space, num_points: int) -> list[dict[str, Param]]:
    """Give all points of a grid, the last hyper-parameter changing fastest.

    Args:
        space: of the Task; every option of a choice is a value.
        num_points: values of each range, from end to end, spaced evenly, or by equal ratios where
            the domain is logarithmic.
    """
    values = [_values(domain, num_points) for domain in space.values()]
    return [dict(zip(space, point, strict=True)) for point in itertools.product(*values)]


def tpe(
    space: Space, objective: Objective, seed: int, known: Sequence[Known], num_trials: int
) -> dict[str, Param]:
    """Ask Optuna's TPE for the next point.

    Args:
        space: of the Task.
        objective: tells whether large values are good.
        seed: of this suggestion.
        known: trials so far; those outside of the space teach nothing.
        num_trials: of the whole search.

    Raises:
        TaskError: Optuna is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise TaskError(
            'search.searcher = "tpe" needs Optuna; install it with: pip install optuna'
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    distributions = {name: _distribution(optuna, domain) for name, domain in space.items()}
    sampler = optuna.samplers.TPESampler(
        seed=seed, constant_liar=True, n_startup_trials=max(MIN_STARTUP, num_trials // 4)
    )
    direction = "maximize" if objective.mode == "max" else "minimize"
    study = optuna.create_study(sampler=sampler, direction=direction)
    for trial in known:
        if all(contains(space[name], trial.params[name]) for name in space):
            study.add_trial(
                optuna.trial.create_trial(
                    params={name: trial.params[name] for name in space},
                    distributions=distributions,
                    value=trial.value,
                    state=optuna.trial.TrialState.RUNNING
                    if trial.value is None
                    else optuna.trial.TrialState.COMPLETE,
                )
            )
    return dict(study.ask(distributions).params)


def contains(domain: Domain, value: Param) -> bool:
    """Tell whether a value may come out of a domain."""
    match domain:
        case Choice(options):
            return value in options
        case RandInt(low, high):
            return isinstance(value, int) and low <= value < high
        case Uniform(low, high) | LogUniform(low, high):
            return isinstance(value, int | float) and low <= value <= high


def parse(domain: Domain, text: str) -> Param | None:
    """Read a value of a domain as MLflow keeps it, as text; None if it is none."""
    try:
        match domain:
            case Choice(options):
                return next((option for option in options if str(option) == text), None)
            case RandInt():
                value: Param = int(text)
            case _:
                value = float(text)
    except ValueError:
        return None
    return value if contains(domain, value) else None


def _draw(domain: Domain, generator: np.random.Generator) -> Param:
    match domain:
        case Choice(options):
            return options[int(generator.integers(len(options)))]
        case Uniform(low, high):
            return float(generator.uniform(low, high))
        case LogUniform(low, high):
            return float(math.exp(generator.uniform(math.log(low), math.log(high))))
        case RandInt(low, high):
            return int(generator.integers(low, high))


def _values(domain: Domain, num_points: int) -> list[Param]:
    match domain:
        case Choice(options):
            return list(options)
        case Uniform(low, high):
            return [float(value) for value in np.linspace(low, high, num_points)]
        case LogUniform(low, high):
            return [float(value) for value in np.geomspace(low, high, num_points)]
        case RandInt(low, high):
            whole = np.linspace(low, high - 1, min(num_points, high - low)).round()
            return [int(value) for value in np.unique(whole)]


def _distribution(optuna: Any, domain: Domain) -> Any:
    match domain:
        case Choice(options):
            return optuna.distributions.CategoricalDistribution(options)
        case Uniform(low, high):
            return optuna.distributions.FloatDistribution(low, high)
        case LogUniform(low, high):
            return optuna.distributions.FloatDistribution(low, high, log=True)
        case RandInt(low, high):
            return optuna.distributions.IntDistribution(low, high - 1)
