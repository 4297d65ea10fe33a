"""A round whose updates the coordinator sees: UPDATES -> AGGREGATE -> COMMITTED | ABORTED."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from minga.federation.coordinator.rounds.events import Answer, PlainUpdateUploaded
from minga.federation.coordinator.rounds.instructions import Instruction
from minga.federation.coordinator.rounds.machine import Round
from minga.federation.coordinator.rounds.order import Stage
from minga.federation.errors import PeerError


@dataclass(slots=True, kw_only=True)
class PlainRound(Round):
    """A plain round: devices train and upload what they learned."""

    FIRST_STAGE: ClassVar[Stage] = Stage.UPDATES

    @property
    def cohort(self) -> tuple[str, ...]:
        """The devices that took part, sorted: those that did not leave before they uploaded."""
        return tuple(sorted(set(self.order.invited) - (self.lost.keys() - self.updates.keys())))

    def factor_of(self, device_id: str) -> float:  # noqa: ARG002 - not so in every plain round
        """Give the factor that a device's update is scaled by."""
        return 1.0

    def _filing(self, event: Answer) -> tuple[Stage, dict[str, Any], Any]:
        if not isinstance(event, PlainUpdateUploaded):
            raise PeerError(f"{event.device_id} answers as if this plain round were secure")
        return Stage.UPDATES, self.updates, event

    def _check(self, event: Answer) -> None:
        assert isinstance(event, PlainUpdateUploaded)
        self._check_update(event)
        most = self.order.plan.max_weight
        if not 1 <= event.num_examples <= most:
            raise PeerError(
                f"{event.device_id} says that it has {event.num_examples} examples; "
                f"this round takes 1 to {most}"
            )

    def _expected_and_answered(self) -> tuple[Collection[str], Collection[str]]:
        if self.stage is Stage.UPDATES:
            return self._invited, self.updates
        return (), ()

    def _leave(self, at: float) -> None:
        count, needed = len(self.updates), self.order.min_cohort
        if count < needed:
            reason = f"{count} of {len(self.order.invited)} devices sent updates"
            self._end(Stage.ABORTED, f"{reason}, {needed} are needed")
            return
        self.stage = Stage.AGGREGATE
        self.stage_started_at = at

    def _step_of(self, device_id: str) -> Instruction:
        raise AssertionError(f"{device_id} has no second step in a plain round")
