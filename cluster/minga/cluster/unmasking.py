"""Unmasking on Ray: actors make a sum's masks, each for a range of the vector.

To an actor go the masks' keys and a range; back comes what the masks add up to in it. The keys are
those of one finished round: the survivors' own masks, and the masks between survivors and lost
devices. They open the sum, and no single update, whose masks among survivors stay unknown; but who
reads Ray's traffic and has the coordinator's uploads can open the sum as the coordinator can.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.cluster.stack import local_ray
from minga.federation.secagg.masking import (
    ApplyMasks,
    Mask,
    apply_masks,
    apply_masks_threaded,
    split_range,
)
from minga.training.interrupts import handlers_restored

_log = logging.getLogger(__name__)


class MaskWorker:
    """Makes masks; runs as an actor, one for each core."""

    def total(self, masks: Sequence[Mask], start: int, stop: int) -> NDArray[np.uint32]:
        """Add masks up over a range of the vector; shape `(stop - start,)`."""
        values = np.zeros(stop - start, np.uint32)
        apply_masks(values, masks, start=start)
        return values


class RayMasks:
    """Applies masks with actors; give it to a coordinator as its `apply_masks`.

    An actor that dies is started anew and does its range again. If Ray itself is gone, threads of
    this process do the work: the result is the same to the bit.

    Args:
        num_actors: How many; as many as the cluster has cores if not given.
    """

    def __init__(self, num_actors: int | None = None) -> None:
        import ray  # noqa: PLC0415 - it reads its settings when it is imported

        cores = int(ray.cluster_resources().get("CPU", 1))
        worker = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)(MaskWorker)
        self._actors: list[Any] = [worker.remote() for _ in range(num_actors or cores)]

    def __call__(self, values: NDArray[np.uint32], masks: Sequence[Mask]) -> None:
        """Add masks to a vector modulo 2**32, in place."""
        import ray  # noqa: PLC0415

        ranges = split_range(values.size, len(self._actors))
        try:
            shared = ray.put(tuple(masks))
            totals = ray.get(
                [
                    actor.total.remote(shared, part.start, part.stop)
                    for actor, part in zip(self._actors, ranges, strict=False)
                ]
            )
        except ray.exceptions.RayError as error:
            _log.warning("Ray cannot unmask (%s); threads do", error)
            apply_masks_threaded(values, masks)
            return
        for part, total in zip(ranges, totals, strict=True):
            values[part.start : part.stop] += total
        _log.info("%d masks were taken off by %d actors on Ray", len(masks), len(ranges))

    def close(self) -> None:
        """End the actors."""
        import ray  # noqa: PLC0415

        for actor in self._actors:
            ray.kill(actor)


@contextmanager
def ray_unmasking(num_actors: int | None = None) -> Iterator[ApplyMasks]:
    """Use the Ray cluster that `RAY_ADDRESS` names, or one on this machine, within the block.

    Args:
        num_actors: See `RayMasks`.
    """
    with _ray():
        masks = RayMasks(num_actors)
        try:
            yield masks
        finally:
            masks.close()


@contextmanager
def _ray() -> Iterator[None]:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        with local_ray():
            yield
        return
    import ray  # noqa: PLC0415

    if ray.is_initialized():
        yield
        return
    with handlers_restored():
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
