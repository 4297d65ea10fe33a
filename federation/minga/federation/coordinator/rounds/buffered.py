"""A plain round that does not wait for its slowest devices: they carry over into the next one.

Buffered asynchronous aggregation: Nguyen et al., "Federated learning with buffered asynchronous
aggregation" (FedBuff), AISTATS 2022, algorithm 1. A round ends when as many updates have come as
the buffer holds. Devices that still train go on: their updates count in a later round, the less the
more rounds they are behind, and not at all beyond a limit.

A device's own round is the one that it was invited to, its *base*: its messages carry that round's
name, whichever round takes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import sqrt

from minga.federation.coordinator.rounds.events import Answer
from minga.federation.coordinator.rounds.instructions import Instruction, TakePart
from minga.federation.coordinator.rounds.order import Stage
from minga.federation.coordinator.rounds.plain import PlainRound


def discount(staleness: int) -> float:
    """Give the factor of an update that is so many rounds behind (Nguyen et al., section 5)."""
    return 1.0 / sqrt(1.0 + staleness)


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The round that a device was invited to."""

    round_id: str
    number: int
    model_digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """What a round needs to know of those before and after it."""

    max_staleness: int
    """Updates that are more rounds behind are dropped."""
    carries: bool
    """Whether another round follows, into which devices carry over."""
    bases: Mapping[str, Base] = field(default_factory=dict)
    """The bases of the invited devices that carried over into this round."""


@dataclass(slots=True, kw_only=True)
class BufferedRound(PlainRound):
    """A plain round whose slow devices stay; `order.buffer` says how."""

    @property
    def buffer(self) -> Buffer:
        """What the order says."""
        assert self.order.buffer is not None
        return self.order.buffer

    @property
    def carried(self) -> tuple[str, ...]:
        """The devices that carry over into the next round, sorted."""
        if self.stage in (Stage.UPDATES, Stage.ABORTED):
            return ()
        return tuple(sorted(set(self.order.invited) - self.updates.keys() - self.lost.keys()))

    @property
    def cohort(self) -> tuple[str, ...]:
        """The devices that took part, sorted."""
        return tuple(sorted(set(self.order.invited) - (self.lost.keys() - self.updates.keys())))

    def base_of(self, device_id: str) -> Base:
        """Give the round that a device was invited to."""
        order = self.order
        here = Base(round_id=order.round_id, number=order.number, model_digest=order.model_digest)
        return self.buffer.bases.get(device_id, here)

    def round_id_of(self, device_id: str) -> str:
        """Give the name under which a device knows its round."""
        return self.base_of(device_id).round_id

    def factor_of(self, device_id: str) -> float:
        """Give the factor that an update is scaled by."""
        return discount(self.order.number - self.base_of(device_id).number)

    def awaits_update(self, device_id: str) -> bool:
        """True also of a device that carries over: its upload goes on meanwhile."""
        return device_id in self.carried or PlainRound.awaits_update(self, device_id)

    def _admits(self, event: Answer) -> bool:
        if event.device_id in self.carried:
            return False  # it is asked again in the next round
        return PlainRound._admits(self, event)

    def _give_up_slow(self, devices: tuple[str, ...]) -> None:
        """Keep devices that still train, but for those that would be too stale."""
        if not self.buffer.carries:
            PlainRound._give_up_slow(self, devices)
            return
        next_number = self.order.number + 1
        for device_id in devices:
            staleness = next_number - self.base_of(device_id).number
            if staleness > self.buffer.max_staleness:
                self.lost[device_id] = f"too stale: {staleness} rounds behind"

    def instruction(self, device_id: str) -> Instruction | None:
        """Say what a device has to do now; one that carries over has only to go on."""
        if device_id in self.carried:
            return None
        told = PlainRound.instruction(self, device_id)
        if isinstance(told, TakePart) and device_id in self.buffer.bases:
            base = self.base_of(device_id)
            order = replace(self.order, round_id=base.round_id, model_digest=base.model_digest)
            return TakePart(order=order)
        return told

    def occasion(self, device_id: str) -> tuple[str, Stage | None]:
        """Name what a device was last told; for one that carries over it stays the same."""
        stage = Stage.UPDATES if device_id in self.carried else self.stage
        is_lost = device_id in self.lost and not self.stage.ended
        return self.round_id_of(device_id), None if is_lost else stage
