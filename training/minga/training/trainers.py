"""Ray Train's trainer, and one for a Ray of a single machine, which starts fewer processes.

Beside the controller and the workers Ray Train starts an actor that asks an autoscaler for
machines, one that manages datasets of Ray Data, and one that frees what a dead controller held.
Each is a process that takes about two seconds of a processor to import what it needs, before the
first epochs or beside them. On one machine they have nothing to do: it cannot grow, Minga's data
does not come through Ray Data, and what is held is freed with the driver.
"""

from typing import Any

import ray
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy

FOR_CLUSTERS = (DatasetsCallback, PlacementGroupCleanerCallback)
"""What of Ray Train's own callbacks starts a process that one machine needs not."""


class LoneTrainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train for a Ray of one machine.

    It overrides what Ray does not promise to keep; `tests/training/test_train.py` counts the
    processes, so that a version of Ray where it has no effect is noticed.
    """

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        kept = [one for one in settings["callbacks"] if not isinstance(one, FOR_CLUSTERS)]
        settings["callbacks"] = kept
        if type(settings["scaling_policy"]) is FixedScalingPolicy:
            settings["scaling_policy"] = FixedSize(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


class FixedSize(FixedScalingPolicy):  # type: ignore[misc]
    """As many workers as were asked for; no autoscaler hears of them."""

    def after_controller_start(self, train_run_context: Any) -> None:
        """Ask for nothing."""

    def _maybe_send_resource_request(self) -> None:
        """Ask for nothing."""


def trainer_class(num_workers_vary: bool) -> type[TorchTrainer]:
    """Choose the trainer for the Ray that this process has joined.

    Args:
        num_workers_vary: whether training goes on with fewer workers, and grows again.
    """
    machines = [node for node in ray.nodes() if node["Alive"]]
    return TorchTrainer if len(machines) > 1 or num_workers_vary else LoneTrainer
