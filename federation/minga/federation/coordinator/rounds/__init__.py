r"""A round as a state machine without I/O: events in, state and instructions out.

    secure:  KEYS -> SHARES -> UPDATES -> CONFIRM -> UNMASK -> AGGREGATE -> COMMITTED
    plain:                     UPDATES -------------------> AGGREGATE -> COMMITTED
               \________\________\_________\_________\___________\-----> ABORTED

    buffered:  as plain; devices that still train when it ends go on into the next round

The stages of a secure round are those of Bonawitz et al., CCS 2017, figure 4; its masking graph is
that of Bell et al., CCS 2020. Rules:

- A stage ends when every device in it has answered or is lost, or when its deadline passes. That
  holds for UNMASK too: shares beyond the threshold are what unmasks a liar among them. UPDATES also
  ends when as many updates have come as the round is for (over-selection: Bonawitz et al., "Towards
  federated learning at scale", MLSys 2019, section 4).
- A device lost before UPDATES is forgotten; one lost after it shared is unmasked by its neighbours.
- Fewer than `min_cohort` members at the end of a stage abort the round.
- A message that arrives twice is taken once; a different second message is refused.
- State is a function of the events alone: replaying them after a crash gives the same round.
- What a device has to do next follows from the state (`instruction`), so nothing is lost when a
  push is lost: the same instruction is given again after a reconnect.

What is not here: sockets, disks, clocks (each event brings its time), arithmetic on updates.
"""

from minga.federation.coordinator.rounds.buffered import Base, Buffer, BufferedRound
from minga.federation.coordinator.rounds.events import (
    Answer,
    AnyUpdate,
    DeadlinePassed,
    DeviceEvent,
    DeviceLost,
    Event,
    KeysAdvertised,
    PlainUpdateUploaded,
    RoundFailed,
    SharesRevealed,
    SharesSent,
    SumComputed,
    SurvivorsConfirmed,
    UpdateUploaded,
)
from minga.federation.coordinator.rounds.instructions import (
    ConfirmSurvivors,
    Finish,
    Instruction,
    RevealShares,
    SendUpdate,
    ShareSecrets,
    TakePart,
    finish,
)
from minga.federation.coordinator.rounds.machine import Round
from minga.federation.coordinator.rounds.order import RoundOrder, Stage, Timeouts
from minga.federation.coordinator.rounds.plain import PlainRound
from minga.federation.coordinator.rounds.secure import SecureRound
from minga.federation.plain import PlainPlan

__all__ = [
    "Answer",
    "AnyUpdate",
    "Base",
    "Buffer",
    "BufferedRound",
    "ConfirmSurvivors",
    "DeadlinePassed",
    "DeviceEvent",
    "DeviceLost",
    "Event",
    "Finish",
    "Instruction",
    "KeysAdvertised",
    "PlainRound",
    "PlainUpdateUploaded",
    "RevealShares",
    "Round",
    "RoundFailed",
    "RoundOrder",
    "SecureRound",
    "SendUpdate",
    "ShareSecrets",
    "SharesRevealed",
    "SharesSent",
    "Stage",
    "SumComputed",
    "SurvivorsConfirmed",
    "TakePart",
    "Timeouts",
    "UpdateUploaded",
    "finish",
    "open_round",
]


def open_round(order: RoundOrder, started_at: float) -> Round:
    """Start the kind of round that an order asks for."""
    if not isinstance(order.plan, PlainPlan):
        return SecureRound(order=order, started_at=started_at)
    kind = PlainRound if order.buffer is None else BufferedRound
    return kind(order=order, started_at=started_at)
