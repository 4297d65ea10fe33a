"""Who trains the devices of a round: this process, or several on Ray.

A worker trains devices together (`stack`) if that is asked for and gives what one by one (`device`)
gives. It sees for itself: with the first devices that it gets it does both and compares.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, Self

import numpy as np

from minga.federation.flower.arrays import without_names
from minga.federation.parameters import Layout
from minga.federation.trainer import Scalar
from minga.training.network import build_network, parameters_of
from minga.training.simulation.device import OneByOne
from minga.training.simulation.lesson import Learnt, Lesson, Matrix, Vector, Way
from minga.training.simulation.partition import Places, Population
from minga.training.simulation.stack import Stack
from minga.training.task import Task, TaskReference

_log = logging.getLogger(__name__)

MAX_DIFFERENCE: Final = 1e-3
"""Together and one by one may differ by this share of what changed. Rounding alone is below 1e-5,
but for optimisers that divide by the size of tiny gradients."""


class Crew(Protocol):
    """Trains and measures virtual devices."""

    @property
    def num_workers(self) -> int:
        """How many processes there are."""
        ...

    def fit(self, devices: Sequence[int], lesson: Lesson) -> Learnt:
        """Train devices; rows are in their order."""
        ...

    def evaluate(self, devices: Sequence[int], lesson: Lesson) -> list[Mapping[str, float]]:
        """Measure on each device's own validation examples, of which it has some."""
        ...

    @property
    def way(self) -> Way | None:
        """How devices were trained last; None if none were yet."""
        ...

    @property
    def one_by_one(self) -> str:
        """Why devices are not trained together; empty if they are, or if none were yet."""
        ...


class Worker:
    """One process's part of the work; alone it is a crew.

    Args:
        task: what devices learn.
        population: their examples.
        config: what their training is told; the network is built as it says.
        vectorise: whether devices may be trained together.
    """

    def __init__(
        self,
        task: Task,
        population: Population,
        config: Mapping[str, Scalar],
        *,
        vectorise: bool = True,
    ) -> None:
        params = {**task.defaults, **without_names(config)}
        network = build_network(task, params, population.train, seed=int(config.get("seed", 0)))
        self._population = population
        layout = Layout.of(parameters_of(network))
        self.num_values = layout.num_values
        """Of the network."""
        self._single = OneByOne(task, layout, population)
        self._stack: Stack | None = None
        self._is_checked = False
        self.num_workers = 1
        self.way: Way | None = None
        self.one_by_one = "" if vectorise else "vectorise is off in [simulation]"
        if vectorise:
            try:
                self._stack = Stack(task, network, population)
            except Exception as error:  # noqa: BLE001 - whatever it is, one by one works or tells
                self._give_up(f"{type(error).__name__}: {error}")

    def fit(self, devices: Sequence[int], lesson: Lesson) -> Learnt:
        """Train devices."""
        if self._stack is not None and not self._is_checked and devices:
            self._check(self._stack, devices, lesson)
        learnt = (self._stack or self._single).fit(devices, lesson)
        self.way = learnt.way
        return learnt

    def evaluate(self, devices: Sequence[int], lesson: Lesson) -> list[Mapping[str, float]]:
        """Measure on each device's own validation examples."""
        return self._single.evaluate(devices, lesson)

    def _check(self, stack: Stack, devices: Sequence[int], lesson: Lesson) -> None:
        """Train the largest and the smallest device in both ways, and compare."""
        sizes = [len(self._population.train_of[device]) for device in devices]
        rows = np.unique([int(np.argmin(sizes)), int(np.argmax(sizes))])
        some, part = [devices[row] for row in rows], lesson.of(rows)
        self._is_checked = True
        try:
            together = stack.fit(some, part)
        except Exception as error:  # noqa: BLE001 - see `__init__`
            self._give_up(f"{type(error).__name__}: {str(error).splitlines()[0]}")
            return
        alone = self._single.fit(some, part)
        if alone.failures or together.failures:  # nothing to compare; both say so
            return
        pairs = [(together.deltas, alone.deltas)]
        if together.gradients is not None and alone.gradients is not None:
            pairs.append((together.gradients, alone.gradients))
        difference = max(_difference(mine, right) for mine, right in pairs)
        if not difference <= MAX_DIFFERENCE:
            self._give_up(
                f"training together gave other results (by {difference:.1%}): the network draws "
                "random numbers, such as dropout, or keeps statistics, such as batch normalisation"
            )

    def _give_up(self, reason: str) -> None:
        _log.info("devices are trained one by one: %s", reason)
        self._stack, self.one_by_one = None, reason


def _difference(found: Matrix, right: Matrix) -> float:
    size = float(np.linalg.norm(right))
    return float(np.linalg.norm(found - right)) / max(size, 1e-12)


class RayCrew:
    """Workers that are Ray actors; each gets a part of every round's devices.

    Ray must be running. A worker whose process or machine dies is started anew and does its part
    again.

    Args:
        reference: of the Task, which every worker loads for itself.
        population: travels through Ray's object store, once for each machine.
        config: see `Worker`.
        num_workers: how many; 0: as many as Ray has processors, or GPUs if it has any.
        vectorise: see `Worker`.
    """

    def __init__(
        self,
        reference: TaskReference,
        population: Population,
        config: Mapping[str, Scalar],
        *,
        num_workers: int = 0,
        vectorise: bool = True,
    ) -> None:
        import ray

        found = ray.cluster_resources()
        num_gpus = int(found.get("GPU", 0))
        count = num_workers or num_gpus or int(found.get("CPU", 1))
        share = {"num_gpus": num_gpus / count} if num_gpus else {}
        actor: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=3, **share)(
            _RemoteWorker
        )
        # In a list it is no argument that Ray fetches before a worker starts anew, and may lose.
        self._stored = [ray.put(population)]
        self._population = population
        self._workers = [
            actor.remote(reference, self._stored, dict(config), vectorise) for _ in range(count)
        ]
        self.way: Way | None = None
        self.one_by_one = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker)

    @property
    def num_workers(self) -> int:
        """How many processes there are."""
        return len(self._workers)

    def fit(self, devices: Sequence[int], lesson: Lesson) -> Learnt:
        """Train devices."""
        parts = self._parts(devices)
        found = self._ask(parts, devices, lesson, lambda worker: worker.fit)
        deltas = np.empty((len(devices), lesson.start.size), np.float32)
        gradients = None if lesson.corrections is None else np.empty_like(deltas)
        failures: dict[int, str] = {}
        for rows, (learnt, reason) in zip(parts, found, strict=True):
            deltas[rows] = learnt.deltas
            if gradients is not None:
                gradients[rows] = learnt.gradients
            failures |= {int(rows[row]): why for row, why in learnt.failures.items()}
            self.one_by_one = self.one_by_one or reason
        way = self.way = found[0][0].way
        return Learnt(deltas=deltas, gradients=gradients, way=way, failures=failures)

    def evaluate(self, devices: Sequence[int], lesson: Lesson) -> list[Mapping[str, float]]:
        """Measure on each device's own validation examples."""
        parts = self._parts(devices)
        found = self._ask(parts, devices, lesson, lambda worker: worker.evaluate)
        measured: list[Mapping[str, float]] = [{}] * len(devices)
        for rows, metrics in zip(parts, found, strict=True):
            for row, one in zip(rows, metrics, strict=True):
                measured[row] = one
        return measured

    def _parts(self, devices: Sequence[int]) -> list[Places]:
        """Deal devices out, the largest first, so that all workers have about as much to do."""
        sizes = [len(self._population.train_of[device]) for device in devices]
        order = np.argsort(sizes, kind="stable")[::-1]
        count = min(len(self._workers), len(devices))
        return [np.sort(order[first::count]) for first in range(count)]

    def _ask(
        self,
        parts: Sequence[Places],
        devices: Sequence[int],
        lesson: Lesson,
        method: Callable[[Any], Any],
    ) -> list[Any]:
        import ray

        start = ray.put(lesson.start)
        rest = replace(lesson, start=lesson.start[:0])
        asked = [
            method(worker).remote([devices[row] for row in rows], rest.of(rows), start)
            for worker, rows in zip(self._workers, parts, strict=False)
        ]
        answers: list[Any] = ray.get(asked)
        return answers


class _RemoteWorker:
    """A `Worker` in a process of its own."""

    def __init__(
        self,
        reference: TaskReference,
        stored: Sequence[Any],
        config: Mapping[str, Scalar],
        vectorise: bool,
    ) -> None:
        import ray

        population = ray.get(stored[0])
        self._worker = Worker(reference.load(), population, config, vectorise=vectorise)

    def fit(self, devices: Sequence[int], lesson: Lesson, start: Vector) -> tuple[Learnt, str]:
        """Train devices from values that came through the object store."""
        learnt = self._worker.fit(devices, replace(lesson, start=start.copy()))
        return learnt, self._worker.one_by_one

    def evaluate(
        self, devices: Sequence[int], lesson: Lesson, start: Vector
    ) -> list[Mapping[str, float]]:
        """Measure what came through the object store."""
        return self._worker.evaluate(devices, replace(lesson, start=start.copy()))
