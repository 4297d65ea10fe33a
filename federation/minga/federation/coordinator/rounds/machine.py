"""The part of a round that does not depend on how updates are protected."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from minga.federation.coordinator.rounds.events import (
    Answer,
    AnyUpdate,
    DeadlinePassed,
    DeviceLost,
    Event,
    RoundFailed,
    SumComputed,
)
from minga.federation.coordinator.rounds.instructions import Instruction, TakePart, finish
from minga.federation.coordinator.rounds.order import RoundOrder, Stage
from minga.federation.errors import PeerError
from minga.federation.work import Training

NOT_NEEDED: Final = "not needed: enough others were faster"
"""Why a device is out of a round that invited more than it needs."""


@dataclass(slots=True, kw_only=True)
class Round(ABC):
    """One round; change it through `apply` alone."""

    FIRST_STAGE: ClassVar[Stage]

    order: RoundOrder
    started_at: float
    stage: Stage = Stage.KEYS
    stage_started_at: float = 0.0
    ended_at: float | None = None
    updates: dict[str, Any] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    result: SumComputed | None = None
    reason: str = ""
    _invited: frozenset[str] = field(init=False)
    """Those of the order: who asks about one device need not go through all of them."""

    def __post_init__(self) -> None:
        self._invited = frozenset(self.order.invited)
        self.stage = self.FIRST_STAGE
        self.stage_started_at = self.started_at

    # --- who is in ---

    @property
    @abstractmethod
    def cohort(self) -> tuple[str, ...]:
        """The devices that took part, sorted."""

    @property
    def sharers(self) -> tuple[str, ...]:
        """The devices whose shares were handed on, sorted; none in a plain round."""
        return ()

    @property
    def survivors(self) -> tuple[str, ...]:
        """The devices whose updates are in the sum, sorted."""
        return tuple(sorted(self.updates))

    def counted_with(self, event: SumComputed) -> list[str]:
        """Give the devices, sorted, whose updates a result has; measuring counts for nothing."""
        if not isinstance(self.order.work, Training):
            return []
        return sorted(set(self.survivors) - dict(event.rejected).keys())

    def deadline(self, not_before: float = 0.0) -> float | None:
        """When the stage ends by itself, on the clock of the events; None: not by itself.

        Args:
            not_before: when the stage's time starts at the earliest. A coordinator that was away
                gives all of it again: nobody could answer it.
        """
        timeout_s = self.order.timeouts.of(self.stage)
        return None if timeout_s is None else max(self.stage_started_at, not_before) + timeout_s

    def missing(self) -> tuple[str, ...]:
        """The devices that the stage still waits for, sorted; they may be more than it needs."""
        expected, answered = self._expected_and_answered()
        return tuple(sorted(set(expected) - set(answered) - self.lost.keys()))

    def _is_waiting(self) -> bool:
        """True while anybody is missing: a cohort answers one by one, so this is asked often."""
        expected, answered = self._expected_and_answered()
        if len(answered) + len(self.lost) < len(expected):
            return True
        return any(name not in answered and name not in self.lost for name in expected)

    # --- events in ---

    def changed_by(self, event: Event) -> bool:
        """Tell whether an event would change the state; nothing is changed yet.

        So an event can be written down before it is applied, and what a crash or a full disk
        keeps from being written down has not happened.

        Returns:
            False for a repetition, or for news that came too late to matter.

        Raises:
            PeerError: the event contradicts the state.
        """
        if self.stage.ended:
            return False
        match event:
            case DeviceLost(device_id=device_id):
                return device_id in self._invited and device_id not in self.lost
            case DeadlinePassed(stage=stage):
                return stage is self.stage
            case SumComputed():
                assert self.stage is Stage.AGGREGATE, f"a sum in stage {self.stage.name}"
                return True
            case RoundFailed():
                return True
            case _:
                return self._admits(event)

    def apply(self, event: Event, at: float) -> bool:
        """Take one event that happened at `at`; returns and raises as `changed_by` does."""
        if not self.changed_by(event):
            return False
        match event:
            case DeviceLost(device_id=device_id, reason=reason):
                self.lost[device_id] = reason
            case DeadlinePassed():
                self._give_up(self.missing(), f"too late for stage {self.stage.name}")
            case SumComputed(rejected=rejected):
                self.result = event
                for device_id, reason in rejected:
                    self.lost[device_id] = reason
                    del self.updates[device_id]
                self._end(Stage.COMMITTED, "")
            case RoundFailed(reason=reason):
                self._end(Stage.ABORTED, reason)
            case _:
                _, answers, answer = self._filing(event)
                answers[event.device_id] = answer
        self._advance(at)
        return True

    def _admits(self, event: Answer) -> bool:
        """Say whether a device's answer is new; refuse it if it cannot be right."""
        stage, answers, answer = self._filing(event)
        known = answers.get(event.device_id)
        if known is not None:
            if known != answer:
                raise PeerError(f"{event.device_id} answered stage {stage.name} twice, differently")
            return False
        if event.device_id in self.lost:
            raise PeerError(f"{event.device_id} left this round: {self.lost[event.device_id]}")
        if stage is not self.stage:
            raise PeerError(f"stage {stage.name} is over or not yet there: {self.stage.name}")
        expected, _ = self._expected_and_answered()
        if event.device_id not in expected:
            raise PeerError(f"{event.device_id} is not in stage {stage.name} of this round")
        self._check(event)
        return True

    def _check_update(self, event: AnyUpdate) -> None:
        me, size = event.device_id, self.order.plan.upload_size
        if event.size != size:
            raise PeerError(f"{me} uploaded {event.size} bytes, expected {size}")

    @abstractmethod
    def _filing(self, event: Answer) -> tuple[Stage, dict[str, Any], Any]:
        """Say in which stage an answer belongs, and under what it is filed.

        Raises:
            PeerError: it belongs to another kind of round.
        """

    @abstractmethod
    def _check(self, event: Answer) -> None:
        """Refuse an answer that cannot be right, whoever sent it."""

    # --- stages ---

    @abstractmethod
    def _expected_and_answered(self) -> tuple[Collection[str], Collection[str]]:
        """Who takes part in the current stage, and who has answered in it."""

    @abstractmethod
    def _leave(self, at: float) -> None:
        """End a stage: go on to the next one, or abort."""

    def _advance(self, at: float) -> None:
        """Leave every stage that is complete."""
        while not self.stage.ended and self.stage is not Stage.AGGREGATE:
            if self._is_waiting():
                if self.stage is not Stage.UPDATES or len(self.updates) < self.order.goal:
                    return
                self._give_up_slow(self.missing())
            self._leave(at)
        if self.stage.ended and self.ended_at is None:
            self.ended_at = at

    def _give_up_slow(self, devices: tuple[str, ...]) -> None:
        """Go on without those that have not answered, since there is enough."""
        self._give_up(devices, NOT_NEEDED)

    def _give_up(self, devices: Collection[str], reason: str) -> None:
        self.lost.update(dict.fromkeys(devices, reason))

    def _end(self, stage: Stage, reason: str) -> None:
        self.stage = stage
        self.reason = reason

    def awaits_update(self, device_id: str) -> bool:
        """True if a device may bring its update now."""
        return self.stage is Stage.UPDATES and device_id in self.missing()

    # --- instructions out ---

    def round_id_of(self, device_id: str) -> str:  # noqa: ARG002 - not so in every kind of round
        """Give the name under which a device knows this round."""
        return self.order.round_id

    def occasion(self, device_id: str) -> tuple[str, Stage | None]:
        """Name what a device is told now: within one occasion that does not change."""
        is_lost = device_id in self.lost and not self.stage.ended
        return self.order.round_id, None if is_lost else self.stage

    def instruction(self, device_id: str) -> Instruction | None:
        """Say what a device has to do now; None if it has only to wait."""
        if device_id not in self._invited:
            return None
        if self.stage.ended or (device_id in self.lost and device_id not in self.updates):
            return finish(
                device_id,
                committed=self.stage is Stage.COMMITTED,
                survivors=self.updates,
                lost=self.lost,
                reason=self.reason,
            )
        if device_id in self.lost:  # its update counts; how the round ends is told at the end
            return None
        expected, answered = self._expected_and_answered()
        if device_id not in expected or device_id in answered:
            return None
        if self.stage is self.FIRST_STAGE:
            return TakePart(order=self.order)
        return self._step_of(device_id)

    @abstractmethod
    def _step_of(self, device_id: str) -> Instruction:
        """Say what a device that has yet to answer in a later stage has to do."""
