"""How the fleet trains: the `[federation]` table of minga.toml."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from minga.federation.aggregation.config import (
    AggregationRuleTable,
    FedAvgTable,
    FederationPrivacyTable,
    MeanTable,
    NoPrivacyTable,
    ServerOptimizerTable,
)
from minga.federation.condition import Requirements
from minga.federation.errors import PeerError
from minga.federation.flower.config import FlowerTable
from minga.federation.limits import MAX_COHORT, MAX_STALENESS, MIB
from minga.federation.trainer import Scalar, proximal_mu
from minga.federation.work import Method


class RequirementsTable(BaseModel):
    """What a device must be like to be invited: `[federation.requirements]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    charging: bool = False
    """Only devices on mains power; a machine without a battery counts as such."""

    idle: bool = False
    """Only devices with at least 70 % of their processors' time unused."""

    min_free_memory_mb: Annotated[int, Field(ge=0)] = 0
    """Only devices with so much free memory, in MiB."""

    min_examples: Annotated[int, Field(ge=0)] = 0
    """Devices with fewer examples leave; each judges that by itself and tells no number."""

    def requirements(self) -> Requirements:
        """Give what the table describes."""
        return Requirements(
            charging=self.charging,
            idle=self.idle,
            min_free_memory_bytes=self.min_free_memory_mb * MIB,
            min_examples=self.min_examples,
        )


class EvaluationTable(BaseModel):
    """How devices measure the global model: `[federation.evaluation]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    enabled: bool = False
    """Devices measure the model after the last round; only the means leave secure aggregation."""

    every: Annotated[int, Field(ge=0)] = 0
    """They measure it after so many rounds each, too; 0: only after the last."""

    metrics: tuple[str, ...] = ()
    """Which metrics; empty: the loss and the objective's."""

    clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    """Metrics are clipped to [-clip, clip]."""


class BufferTable(BaseModel):
    """Rounds that do not wait for slow devices: `[federation.buffer]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    size: Annotated[int, Field(ge=0, le=MAX_COHORT)] = 0
    """A round ends with so many updates, while up to `cohort` devices train; the others go on into
    the next rounds. 0: every round waits. For plain campaigns."""

    max_staleness: Annotated[int, Field(ge=0, le=MAX_STALENESS)] = 4
    """An update that is more rounds behind is dropped; one that is s behind counts 1/sqrt(1+s)."""


class FederationConfig(BaseModel):
    """A campaign: some rounds that train one model further on devices."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    num_rounds: Annotated[int, Field(ge=1, le=10_000)] = 5
    """How many rounds are to be committed."""

    group: str = ""
    """Only devices of this group are invited; empty: all groups."""

    cohort: Annotated[int, Field(ge=3, le=MAX_COHORT)] = 8
    """How many devices a round invites at most."""

    min_cohort: Annotated[int, Field(ge=3)] = 3
    """A round with fewer updates than this is aborted: a sum over few hides little."""

    over_selection: Annotated[float, Field(ge=0, le=1)] = 0.0
    """So many devices more than the cohort are invited, as a share of it; the cohort's fastest
    count, the others are told that they are not needed."""

    protection: Literal["secure", "plain"] = "secure"
    """secure: the coordinator learns sums of updates alone. plain: it sees each update; devices
    take part only if their owners set allow_plain."""

    groups: Annotated[int, Field(ge=1)] = 1
    """A secure round sums within so many groups of equal size: the coordinator learns a sum per
    group, so that rules against liars have something to compare."""

    clip: Annotated[float, Field(gt=0)] = 2.0
    """Each coordinate of an update is clipped to [-clip, clip] before it is rounded, after the
    rotation if there is one: then four times the update's root mean square is enough."""

    value_bits: Annotated[int, Field(ge=4, le=24)] = 17
    """Bits of a rounded coordinate; the step is about clip / 2**(value_bits - 1)."""

    rotate: bool = True
    """Rotate updates at random before they are clipped: their coordinates become about equally
    large, so that a smaller clip and fewer bits hold them."""

    max_weight: Annotated[int, Field(ge=1)] = 4096
    """A device counts for at most so many examples. Devices with few of them round coarsely: set it
    near the examples of the largest device."""

    expected_dropout: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    """The share of a cohort that may vanish in a round without aborting it."""

    colluder_share: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """The share of a cohort that may pool what it sees with the coordinator."""

    invite_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a round waits for devices to come."""

    stage_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a stage without training waits for its slowest device."""

    training_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """How long a round waits for updates."""

    training: dict[str, Scalar] = Field(default_factory=dict)
    """Parameters that the devices' training gets beside the model's own; proximal_mu above 0 makes
    it FedProx: devices are pulled back to the global model that they started from."""

    requirements: RequirementsTable = RequirementsTable()
    """Which devices are invited."""

    personal: tuple[str, ...] = ()
    """Tensors whose names match one of these patterns, such as "model.head.*", never leave a
    device: each device trains and keeps its own."""

    scaffold: bool = False
    """Devices correct their gradients by control variates (SCAFFOLD), so that many local steps on
    unlike data do not pull the model apart; updates are twice as long, devices count alike."""

    buffer: BufferTable = BufferTable()
    """Whether rounds wait for slow devices."""

    evaluation: EvaluationTable = EvaluationTable()
    """How devices measure the global model."""

    server_optimizer: ServerOptimizerTable = FedAvgTable()
    """What the coordinator makes of a round's mean update; `name` says which."""

    flower: FlowerTable = FlowerTable()
    """Apps and strategies that were written for Flower."""

    rule: AggregationRuleTable = MeanTable()
    """How one mean update is made of a plain round's updates, or of the sums of a secure round's
    groups; `name` says which."""

    privacy: FederationPrivacyTable = NoPrivacyTable()
    """Differential privacy of devices: noise hides each of them in the mean; `name` says who adds
    it."""

    @field_validator("training")
    @classmethod
    def _pull_is_possible(cls, training: dict[str, Scalar]) -> dict[str, Scalar]:
        proximal_mu(training)
        return training

    @field_validator("personal")
    @classmethod
    def _patterns_are_possible(cls, personal: tuple[str, ...]) -> tuple[str, ...]:
        try:
            Method(personal=personal)
        except PeerError as error:
            raise ValueError(str(error)) from error
        return personal

    @model_validator(mode="after")
    def _cohort_holds_minimum(self) -> "FederationConfig":
        if self.min_cohort > self.cohort:
            raise ValueError(f"min_cohort {self.min_cohort} is above cohort {self.cohort}")
        if self.cohort % self.groups or self.min_cohort % self.groups:
            raise ValueError(
                f"cohort {self.cohort} and min_cohort {self.min_cohort} do not make "
                f"{self.groups} groups of equal size"
            )
        if self.buffer.size and self.protection != "plain":
            raise ValueError(
                "buffer is for plain campaigns: masks cancel only among devices in the same sum"
            )
        if self.protection == "plain" and self.groups > 1:
            raise ValueError("groups are for secure rounds; a plain one shows every update anyway")
        if self.flower.strategy and self.server_optimizer != FedAvgTable():
            raise ValueError("a Flower strategy takes the server optimiser's place; choose one")
        if self.flower.strategy and (self.rule, self.privacy) != (MeanTable(), NoPrivacyTable()):
            raise ValueError("a Flower strategy takes the place of rule and privacy; choose one")
        return self

    @model_validator(mode="after")
    def _rule_has_enough(self) -> "FederationConfig":
        smallest = self.min_cohort if self.protection == "plain" else self.groups
        self.rule.rule().require_enough(smallest)
        return self

    @model_validator(mode="after")
    def _privacy_is_possible(self) -> "FederationConfig":
        privacy = self.privacy.privacy()
        if privacy is not None and self.rule != MeanTable():
            raise ValueError("privacy takes the mean: it bounds what one update changes in it")
        if privacy is not None and self.groups > 1:
            raise ValueError("privacy takes one sum: several groups would need noise each")
        if privacy is not None and privacy.is_distributed and self.protection == "plain":
            raise ValueError(
                "devices add noise in secure rounds; in plain ones the coordinator does"
            )
        return self
