"""Apple's pfl: its simulated backend in one process, with the cohorts that it is given."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from harness import answer_requests
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDatasetBase
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from rivals.simulation_work import BATCH_SIZE, LEARNING_RATE, Work, network, pace


class Network(torch.nn.Module):
    """The network with the two methods that pfl asks for."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.layers = network(work.first)
        self._loss = torch.nn.CrossEntropyLoss()

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give the mean loss over a batch."""
        return self._loss(self.layers(inputs), targets)

    def metrics(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Weighted]:
        """Give the accuracy; pfl asks for it in the first round alone."""
        right = (self.layers(inputs).argmax(dim=1) == targets).sum().item()
        return {"accuracy": Weighted(right, len(targets))}


class Devices(FederatedDatasetBase):
    """The work's devices, in its cohorts."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._users = [
            Dataset((torch.from_numpy(work.inputs[own]), torch.from_numpy(work.targets[own])))
            for own in work.devices
        ]
        self._cohorts = iter(work.cohorts)

    def __next__(self) -> tuple[Dataset, int]:
        """Nobody asks for single users."""
        raise NotImplementedError

    def get_cohort(self, cohort_size: int) -> Iterable[tuple[Dataset, int]]:
        """Give the next round's devices."""
        cohort = next(self._cohorts)
        assert len(cohort) == cohort_size
        return ((self._users[device], 0) for device in cohort)


class Clock(TrainingProcessCallback):
    """Notes when rounds end."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def after_central_iteration(self, *_: Any, **__: Any) -> tuple[bool, Metrics]:
        """Note the moment."""
        self.stamps.append(time.perf_counter())
        return False, Metrics()


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run all rounds."""
    torch.set_num_threads(1)
    np.random.seed(0)
    work = Work.load(request["work"])
    model, devices, clock = Network(work), Devices(work), Clock()
    training = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH_SIZE
    )
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=len(work.cohorts),
            evaluation_frequency=len(work.cohorts) + 1,
            train_cohort_size=work.cohorts.shape[1],
            val_cohort_size=None,
        ),
        SimulatedBackend(devices, devices, postprocessors=[WeightByDatapoints()]),
        PyTorchModel(model, torch.optim.SGD, torch.optim.SGD(model.parameters(), lr=1.0)),
        training,
        NNEvalHyperParams(local_batch_size=None),
        [clock],
        send_metrics_to_platform=False,
    )
    weights = [parameter.detach().numpy() for parameter in model.layers.parameters()]
    return {"pace": pace(clock.stamps), "accuracy": work.accuracy(weights)}


if __name__ == "__main__":
    answer_requests(answer)
