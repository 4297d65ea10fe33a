"""What one virtual device does in a round: exactly what a real one does.

`minga.training.federated.TaskTrainer` trains and measures, as in a device's trainer process.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from minga.federation.parameters import Layout
from minga.training.errors import TrainingError
from minga.training.federated import TaskTrainer
from minga.training.simulation.lesson import Learnt, Lesson, Way
from minga.training.simulation.partition import Population
from minga.training.task import Task


class OneByOne:
    """Trains the devices of a round one after the other.

    Args:
        task: what they learn.
        layout: of the network's parameters.
        population: the devices' examples.
    """

    def __init__(self, task: Task, layout: Layout, population: Population) -> None:
        self._task = task
        self._layout = layout
        self._population = population

    def fit(self, devices: Sequence[int], lesson: Lesson) -> Learnt:
        """Train devices; one whose training fails is among the failures."""
        deltas = np.zeros((len(devices), self._layout.num_values), np.float32)
        gradients = None if lesson.corrections is None else np.zeros_like(deltas)
        failures: dict[int, str] = {}
        for row, device in enumerate(devices):
            try:
                self._fit(row, device, lesson, deltas, gradients)
            except TrainingError as error:
                failures[row] = str(error)
        return Learnt(deltas=deltas, gradients=gradients, way=Way.ONE_BY_ONE, failures=failures)

    def _fit(
        self,
        row: int,
        device: int,
        lesson: Lesson,
        deltas: np.ndarray,
        gradients: np.ndarray | None,
    ) -> None:
        layout, trainer = self._layout, self._trainer(device)
        start = layout.unflatten(lesson.start_of(row))
        correction = lesson.correction_of(row, layout)
        if correction is None:
            update = trainer.fit(start, lesson.config)
        else:
            update = trainer.fit_corrected(start, lesson.config, correction)
        deltas[row] = layout.flatten(dict(update.delta))
        if gradients is not None:
            found = update.gradient or {}
            blank = layout.unflatten(gradients[row])
            for name, gradient in found.items():
                blank[name][...] = gradient

    def evaluate(self, devices: Sequence[int], lesson: Lesson) -> list[Mapping[str, float]]:
        """Measure what each device would predict with, on its own validation examples."""
        return [
            self._trainer(device).evaluate(
                self._layout.unflatten(lesson.start_of(row)), lesson.config
            )
            for row, device in enumerate(devices)
        ]

    def _trainer(self, device: int) -> TaskTrainer:
        return TaskTrainer(self._task, self._population.splits_of(device))
