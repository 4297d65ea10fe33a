"""Sites whose losses are known quadratics with minima far apart, and SCAFFOLD in plain numpy.

Site i has the loss `sum(a_i * (x - b_i)**2) / 2`. Where sites are unlike both in a and in b, many
local steps lead federated averaging to a point that is not the least of the mean loss; SCAFFOLD
finds it (Karimireddy et al., ICML 2020, sections 3 and 6).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minga.federation.device.trainer_process import TrainedUpdate
from minga.federation.parameters import Parameters, read_layout, read_parameters
from minga.federation.trainer import TrainingConfig, Update

Point = NDArray[np.float64]

RATE, NUM_STEPS = 0.05, 10
NAME = "x"


@dataclass(frozen=True)
class Site:
    """One site's loss."""

    curvature: Point
    minimum: Point

    def gradient(self, point: Point) -> Point:
        return self.curvature * (point - self.minimum)


SITES = (
    Site(np.array([1.0, 8.0]), np.array([2.0, 1.0])),
    Site(np.array([6.0, 1.0]), np.array([-2.0, -1.0])),
    Site(np.array([2.0, 2.0]), np.array([0.5, -2.0])),
    Site(np.array([0.5, 4.0]), np.array([1.0, 2.0])),
)

OPTIMUM = np.sum([s.curvature * s.minimum for s in SITES], axis=0) / np.sum(
    [s.curvature for s in SITES], axis=0
)
"""The least of the mean loss."""


class SiteTrainer:
    """Takes `NUM_STEPS` steps down its own hill."""

    def __init__(self, site: Site) -> None:
        self.site = site

    async def fit(self, model: Path, config: TrainingConfig) -> TrainedUpdate:
        update = self.descend(read_parameters(model), np.zeros(2))
        return TrainedUpdate(
            layout=read_layout(model),
            vector=update.delta[NAME],
            num_examples=update.num_examples,
            metrics={},
        )

    async def fit_corrected(
        self, parameters: Parameters, config: TrainingConfig, correction: Parameters
    ) -> Update:
        return self.descend(parameters, correction[NAME].astype(np.float64))

    def descend(self, parameters: Parameters, correction: Point) -> Update:
        start = parameters[NAME].astype(np.float64)
        point, gradients = start, []
        for _ in range(NUM_STEPS):
            gradients.append(self.site.gradient(point))
            point = point - RATE * (gradients[-1] + correction)
        return Update(
            delta={NAME: (point - start).astype(np.float32)},
            num_examples=10,
            gradient={NAME: np.mean(gradients, axis=0).astype(np.float32)},
        )


class Scaffold:
    """Algorithm 1 of Karimireddy et al. with option II, line by line."""

    def __init__(self, start: Point) -> None:
        self.model = start
        self.control = np.zeros_like(start)
        self.controls = [np.zeros_like(start) for _ in SITES]

    def round(self, sampled: Sequence[int]) -> None:
        """Take one round with some of the sites."""
        moves, changes = [], []
        for index in sampled:
            own, point = self.controls[index], self.model
            for _ in range(NUM_STEPS):
                gradient = SITES[index].gradient(point)
                point = point - RATE * (gradient - own + self.control)
            renewed = own - self.control + (self.model - point) / (NUM_STEPS * RATE)
            moves.append(point - self.model)
            changes.append(renewed - own)
            self.controls[index] = renewed
        self.model = self.model + np.mean(moves, axis=0)
        self.control = self.control + len(sampled) / len(SITES) * np.mean(changes, axis=0)
