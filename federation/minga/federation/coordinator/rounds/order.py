"""What a round is to do, and where it can be."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from minga.federation.aggregation.privacy import PrivateEncoding
from minga.federation.plain import PlainPlan
from minga.federation.secagg.plan import RoundPlan
from minga.federation.trainer import Scalar
from minga.federation.work import TRAINING, USUAL_METHOD, Method, Work

if TYPE_CHECKING:
    from minga.federation.coordinator.rounds.buffered import Buffer


class Stage(Enum):
    """Where a round is; the values are those of the wire's RoundStage."""

    KEYS = 1
    SHARES = 2
    UPDATES = 3
    CONFIRM = 4
    UNMASK = 5
    AGGREGATE = 6
    COMMITTED = 7
    ABORTED = 8

    @property
    def ended(self) -> bool:
        """True where nothing more can happen."""
        return self in (Stage.COMMITTED, Stage.ABORTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long, in seconds, a stage waits for its slowest device."""

    keys_s: float = 30.0
    stage_s: float = 30.0
    updates_s: float = 600.0

    def of(self, stage: Stage) -> float | None:
        """Give the time that a stage may last; None where no device is waited for."""
        if stage is Stage.KEYS:
            return self.keys_s
        if stage is Stage.UPDATES:
            return self.updates_s
        if stage in (Stage.SHARES, Stage.CONFIRM, Stage.UNMASK):
            return self.stage_s
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundOrder:
    """What a round is to do; fixed before the first device hears of it."""

    round_id: str
    number: int
    plan: RoundPlan | PlainPlan
    """Masked sums, or updates that the coordinator sees."""
    invited: tuple[str, ...]
    min_cohort: int
    """Fewer members than this at the end of a stage abort the round."""
    goal: int
    """So many updates end the wait for more; above it, invited devices are there for losses."""
    num_groups: int = 1
    """A secure round sums within so many groups; `plan` is the plan of each of them."""
    model_digest: bytes
    training: Mapping[str, Scalar]
    timeouts: Timeouts
    work: Work = TRAINING
    method: Method = USUAL_METHOD
    model_name: str = ""
    campaign_id: str = ""
    population: int = 0
    """How many devices a control variate is a mean over, in this round or not."""
    buffer: "Buffer | None" = None
    """A plain round does not wait for slow devices, if this is set."""
    min_examples: int = 0
    """A device with fewer is to withdraw."""
    encoding: PrivateEncoding | None = None
    """How devices make their updates private; None: not at all."""
