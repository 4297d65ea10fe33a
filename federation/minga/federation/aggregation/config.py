"""What a campaign makes of its updates, as tables of minga.toml.

`[federation.server_optimizer]` says where the model goes, `[federation.rule]` how one mean update
is made of many, `[federation.privacy]` what hides each device in it.
"""

from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from minga.federation.aggregation.adaptive_clip import AdaptiveClip
from minga.federation.aggregation.ledger import Budget
from minga.federation.aggregation.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)
from minga.federation.aggregation.privacy import Privacy
from minga.federation.aggregation.rules import (
    Clip,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    Rule,
    TrimmedMean,
)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Minority = Annotated[float, Field(ge=0.001, lt=0.5)]
Probability = Annotated[float, Field(gt=0, lt=1)]


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


class RuleTable(BaseModel, ABC):
    """One rule and its numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    clip: Positive | Literal["median"] | None = None
    """Updates longer than this (Euclidean length) are shortened to it before the rule; "median":
    than the median length of the round's updates. Nothing is shortened without it."""

    @abstractmethod
    def rule(self) -> Rule:
        """Give what the table describes."""

    def clipping(self) -> Clip | None:
        """Give what is done before the rule."""
        match self.clip:
            case None:
                return None
            case "median":
                return Clip()
            case max_norm:
                return Clip(max_norm=max_norm)


class MeanTable(RuleTable):
    """The weighted mean (McMahan et al. 2017)."""

    name: Literal["mean"] = "mean"
    """The mean by numbers of examples: for fleets that are trusted; one liar moves it anywhere."""

    def rule(self) -> Rule:
        """Give what the table describes."""
        return Mean(clip=self.clipping())


class MedianTable(RuleTable):
    """The coordinate-wise median (Yin et al. 2018)."""

    name: Literal["median"] = "median"
    """The median of each coordinate: bears any minority of liars; takes 3 updates or more."""

    def rule(self) -> Rule:
        """Give what the table describes."""
        return Median(clip=self.clipping())


class TrimmedMeanTable(RuleTable):
    """The trimmed mean (Yin et al. 2018)."""

    name: Literal["trimmed_mean"] = "trimmed_mean"
    """The mean of each coordinate without its largest and smallest values: loses less than the
    median where nobody lies; takes 1 / liar_share updates or more."""

    liar_share: Minority = 0.2
    """The share of updates that may be lies; as many are cut off at either end."""

    def rule(self) -> Rule:
        """Give what the table describes."""
        return TrimmedMean(liar_share=self.liar_share, clip=self.clipping())


class KrumTable(RuleTable):
    """Krum (Blanchard et al. 2017)."""

    name: Literal["krum"] = "krum"
    """The one update that has others nearest: for fleets with alike data; takes 2f + 3 updates or
    more, of which f are lies."""

    liar_share: Minority = 0.2
    """The share of updates that may be lies."""

    def rule(self) -> Rule:
        """Give what the table describes."""
        return Krum(liar_share=self.liar_share, clip=self.clipping())


class MultiKrumTable(RuleTable):
    """Multi-Krum (Blanchard et al. 2017)."""

    name: Literal["multi_krum"] = "multi_krum"
    """The mean of the n - f - 2 of n updates that have others nearest; takes 2f + 3 updates or
    more, of which f are lies."""

    liar_share: Minority = 0.2
    """The share of updates that may be lies."""

    def rule(self) -> Rule:
        """Give what the table describes."""
        return MultiKrum(liar_share=self.liar_share, clip=self.clipping())


class GeometricMedianTable(RuleTable):
    """The geometric median (Pillutla et al. 2022)."""

    name: Literal["geometric_median"] = "geometric_median"
    """The point nearest to all updates together: bears any minority of liars; takes 3 updates or
    more."""

    def rule(self) -> Rule:
        """Give what the table describes."""
        return GeometricMedian(clip=self.clipping())


AggregationRuleTable = Annotated[
    MeanTable | MedianTable | TrimmedMeanTable | KrumTable | MultiKrumTable | GeometricMedianTable,
    Field(discriminator="name"),
]
"""The table's `name` says which one it is."""


class PrivacyTable(BaseModel, ABC):
    """What hides each device in the mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @abstractmethod
    def privacy(self) -> Privacy | None:
        """Give what the table describes."""


class NoPrivacyTable(PrivacyTable):
    """No differential privacy."""

    name: Literal["none"] = "none"
    """No noise, and no bound on what one device changes."""

    def privacy(self) -> None:
        """Give nothing."""
        return


class NoisyTable(PrivacyTable, ABC):
    """Noise, and what may be spent."""

    epsilon: Positive
    """The most that all rounds with the fleet may have spent, earlier campaigns' included; a round
    that would spend more is refused."""

    delta: Probability
    """The probability with which epsilon may not hold; well below one over the number of
    devices."""

    noise_multiplier: Positive
    """The noise on the sum of updates, as a multiple of max_norm: the more, the less a round
    spends."""

    max_norm: Positive
    """Updates longer than this (Euclidean length) are shortened to it; it takes the place of
    clip. All devices count the same, whatever their number of examples."""

    quantile: Probability | None = None
    """With it max_norm is only where the bound begins, and follows this quantile of the updates'
    lengths (Andrew et al. 2021); takes more than 10 noise_multiplier devices. 0.5 is a good
    choice."""

    quantile_rate: Positive = 0.2
    """How fast the bound follows: by this as an exponent, at most, in each round."""


class CentralPrivacyTable(NoisyTable):
    """Noise that the coordinator adds (McMahan et al. 2018)."""

    name: Literal["central"] = "central"
    """The coordinator adds noise to the mean: it is trusted with what it sees, and its models are
    private."""

    def privacy(self) -> Privacy:
        """Give what the table describes."""
        return _privacy(self, is_distributed=False)


class DistributedPrivacyTable(NoisyTable):
    """Noise that devices add (Kairouz et al. 2021)."""

    name: Literal["distributed"] = "distributed"
    """Every device adds a share of the noise before its update is masked: not even the coordinator
    sees a sum without noise. Takes secure rounds, and chooses value_bits itself."""

    def privacy(self) -> Privacy:
        """Give what the table describes."""
        return _privacy(self, is_distributed=True)


def _privacy(table: NoisyTable, *, is_distributed: bool) -> Privacy:
    clip = None
    if table.quantile is not None:
        clip = AdaptiveClip(quantile=table.quantile, learning_rate=table.quantile_rate)
    return Privacy(
        budget=Budget(epsilon=table.epsilon, delta=table.delta),
        noise_multiplier=table.noise_multiplier,
        max_norm=table.max_norm,
        is_distributed=is_distributed,
        clip=clip,
    )


FederationPrivacyTable = Annotated[
    NoPrivacyTable | CentralPrivacyTable | DistributedPrivacyTable, Field(discriminator="name")
]
"""The table's `name` says where the noise is added."""
