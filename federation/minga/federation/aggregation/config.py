"""Which server optimiser a campaign uses: the `[federation.server_optimizer]` table."""

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from minga.federation.aggregation.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerTable(BaseModel, ABC):
    """One server optimiser and its numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @abstractmethod
    def optimizer(self) -> ServerOptimizer:
        """Give what the table describes."""


class FedAvgTable(OptimizerTable):
    """Federated averaging (McMahan et al. 2017)."""

    name: Literal["fedavg"] = "fedavg"
    """Federated averaging: the model moves along the mean update."""

    learning_rate: Positive = 1.0
    """The model moves by this times the mean update."""

    def optimizer(self) -> ServerOptimizer:
        """Give what the table describes."""
        return FedAvg(learning_rate=self.learning_rate)


class FedAvgMTable(OptimizerTable):
    """Averaging with momentum (Hsu et al. 2019)."""

    name: Literal["fedavgm"] = "fedavgm"
    """Averaging with momentum: steadier when rounds draw devices with unlike data."""

    learning_rate: Positive = 1.0
    """The model moves by this times the momentum, which is up to 1 / (1 - momentum) updates."""

    momentum: Share = 0.9
    """How much of the momentum stays each round."""

    def optimizer(self) -> ServerOptimizer:
        """Give what the table describes."""
        return FedAvgM(learning_rate=self.learning_rate, momentum=self.momentum)


class FedAdagradTable(OptimizerTable):
    """Adagrad on the server (Reddi et al. 2021)."""

    name: Literal["fedadagrad"] = "fedadagrad"
    """Adagrad: rare coordinates, such as rare words, go far; steps get shorter each round."""

    learning_rate: Positive = 0.1
    """About how far a coordinate moves in the first rounds, while its updates agree."""

    beta_1: Share = 0.0
    """How much of the running mean of updates stays each round."""

    tau: Positive = 1e-3
    """Added to the root of the variance: the smaller, the more each coordinate has its own rate."""

    def optimizer(self) -> ServerOptimizer:
        """Give what the table describes."""
        return FedAdagrad(learning_rate=self.learning_rate, beta_1=self.beta_1, tau=self.tau)


class FedAdamTable(OptimizerTable):
    """Adam on the server (Reddi et al. 2021)."""

    name: Literal["fedadam"] = "fedadam"
    """Adam: each coordinate has its own rate, by how large its updates are of late."""

    learning_rate: Positive = 0.1
    """About how far a coordinate moves in a round while its updates agree."""

    beta_1: Share = 0.9
    """How much of the running mean of updates stays each round."""

    beta_2: Share = 0.99
    """How much of the running mean of squared updates stays each round."""

    tau: Positive = 1e-3
    """Added to the root of the variance: the smaller, the more each coordinate has its own rate."""

    def optimizer(self) -> ServerOptimizer:
        """Give what the table describes."""
        return FedAdam(
            learning_rate=self.learning_rate, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau
        )


class FedYogiTable(OptimizerTable):
    """Yogi on the server (Reddi et al. 2021)."""

    name: Literal["fedyogi"] = "fedyogi"
    """Yogi: as Adam, but rates rise again only slowly after large updates."""

    learning_rate: Positive = 0.1
    """About how far a coordinate moves in a round while its updates agree."""

    beta_1: Share = 0.9
    """How much of the running mean of updates stays each round."""

    beta_2: Share = 0.99
    """How much of the variance stays each round."""

    tau: Positive = 1e-3
    """Added to the root of the variance: the smaller, the more each coordinate has its own rate."""

    def optimizer(self) -> ServerOptimizer:
        """Give what the table describes."""
        return FedYogi(
            learning_rate=self.learning_rate, beta_1=self.beta_1, beta_2=self.beta_2, tau=self.tau
        )


ServerOptimizerTable = Annotated[
    FedAvgTable | FedAvgMTable | FedAdagradTable | FedAdamTable | FedYogiTable,
    Field(discriminator="name"),
]
"""The table's `name` says which one it is."""
