r"""A round as a state machine without I/O: events in, state and instructions out.

    KEYS -> SHARES -> UPDATES -> CONFIRM -> UNMASK -> AGGREGATE -> COMMITTED
      \________\_________\_________\_________\___________\-------> ABORTED

The stages are those of Bonawitz et al., CCS 2017, figure 4; the masking graph is that of Bell et
al., CCS 2020. Rules:

- A stage ends when every device in it has answered or is lost, or when its deadline passes. That
  holds for UNMASK too: shares beyond the threshold are what unmasks a liar among them.
- A device lost before UPDATES is forgotten; one lost after it shared is unmasked by its neighbours.
- Fewer than `min_cohort` members at the end of a stage abort the round.
- A message that arrives twice is taken once; a different second message is refused.
- State is a function of the events alone: replaying them after a crash gives the same round.
- What a device has to do next follows from the state (`instruction`), so nothing is lost when a
  push is lost: the same instruction is given again after a reconnect.

What is not here: sockets, disks, clocks (each event brings its time), arithmetic on updates.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from minga.federation.errors import PeerError
from minga.federation.secagg.coordinator import can_unmask, check_reveal, check_shares
from minga.federation.secagg.graph import neighbours
from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare, Reveal
from minga.federation.secagg.plan import RoundPlan
from minga.federation.trainer import Scalar


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
    plan: RoundPlan
    invited: tuple[str, ...]
    min_cohort: int
    model_digest: bytes
    training: Mapping[str, Scalar]
    timeouts: Timeouts


# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysAdvertised:
    """A device takes part, with these keys."""

    device_id: str
    advert: Advert


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesSent:
    """A device shared its secrets among its neighbours."""

    device_id: str
    shares: tuple[EncryptedShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateUploaded:
    """A device's masked update is stored whole, under this digest."""

    device_id: str
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivorsConfirmed:
    """A device signed the list of survivors."""

    device_id: str
    confirmation: Confirmation


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesRevealed:
    """A device revealed its neighbours' shares."""

    device_id: str
    reveal: Reveal


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLost:
    """A device withdrew, was revoked, or stayed away too long."""

    device_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinePassed:
    """The time of a stage is up."""

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class SumComputed:
    """The next global model is stored, and what the server optimiser keeps, if it keeps any."""

    model_digest: bytes
    total_weight: int
    optimizer_digest: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFailed:
    """The round cannot go on."""

    reason: str


Answer = KeysAdvertised | SharesSent | UpdateUploaded | SurvivorsConfirmed | SharesRevealed
DeviceEvent = Answer | DeviceLost
Event = DeviceEvent | DeadlinePassed | SumComputed | RoundFailed


# --- instructions -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Advertise:
    """Take part: fetch the model, start training, send keys."""

    order: RoundOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareSecrets:
    """Here are your neighbours' keys: share your secrets among them."""

    adverts: tuple[Advert, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendUpdate:
    """Here are the shares made for you: mask your update and upload it."""

    shares: tuple[EncryptedShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmSurvivors:
    """These devices are in the sum: sign that you saw this list."""

    survivors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RevealShares:
    """This is what your neighbours signed: reveal your shares."""

    confirmations: tuple[Confirmation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The round is over for you."""

    committed: bool
    counted: bool
    reason: str


def finish(
    device_id: str,
    *,
    committed: bool,
    survivors: Collection[str],
    lost: Mapping[str, str],
    reason: str,
) -> Finish:
    """Say how a round ended for one of its devices; why, unless it is in the sum."""
    counted = committed and device_id in survivors
    return Finish(
        committed=committed,
        counted=counted,
        reason="" if counted else lost.get(device_id, reason),
    )


Instruction = Advertise | ShareSecrets | SendUpdate | ConfirmSurvivors | RevealShares | Finish


# --- the machine ------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Round:
    """One round; change it through `apply` alone."""

    order: RoundOrder
    started_at: float
    stage: Stage = Stage.KEYS
    stage_started_at: float = 0.0
    ended_at: float | None = None
    graph: dict[str, tuple[str, ...]] = field(default_factory=dict)
    adverts: dict[str, Advert] = field(default_factory=dict)
    shares: dict[str, tuple[EncryptedShare, ...]] = field(default_factory=dict)
    updates: dict[str, UpdateUploaded] = field(default_factory=dict)
    confirmations: dict[str, Confirmation] = field(default_factory=dict)
    reveals: dict[str, Reveal] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    result: SumComputed | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        self.stage_started_at = self.started_at

    # --- who is in ---

    @property
    def cohort(self) -> tuple[str, ...]:
        """The devices that advertised keys in time, sorted."""
        return tuple(sorted(self.graph or self.adverts))

    @property
    def sharers(self) -> tuple[str, ...]:
        """The devices whose shares were handed on, sorted."""
        return tuple(sorted(self.shares))

    @property
    def survivors(self) -> tuple[str, ...]:
        """The devices whose masked updates are in the sum, sorted."""
        return tuple(sorted(self.updates))

    def deadline(self, not_before: float = 0.0) -> float | None:
        """When the stage ends by itself, on the clock of the events; None: not by itself.

        Args:
            not_before: when the stage's time starts at the earliest. A coordinator that was away
                gives all of it again: nobody could answer it.
        """
        timeout_s = self.order.timeouts.of(self.stage)
        return None if timeout_s is None else max(self.stage_started_at, not_before) + timeout_s

    def missing(self) -> tuple[str, ...]:
        """The devices that the stage still waits for, sorted."""
        expected, answered = self._expected_and_answered()
        return tuple(sorted(set(expected) - set(answered) - self.lost.keys()))

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
                return device_id in self.order.invited and device_id not in self.lost
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
                late = f"too late for stage {self.stage.name}"
                self.lost.update(dict.fromkeys(self.missing(), late))
            case SumComputed():
                self.result = event
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

    def _filing(self, event: Answer) -> tuple[Stage, dict[str, Any], Any]:
        """Say in which stage an answer belongs, and under what it is filed."""
        match event:
            case KeysAdvertised():
                return Stage.KEYS, self.adverts, event.advert
            case SharesSent():
                return Stage.SHARES, self.shares, event.shares
            case UpdateUploaded():
                return Stage.UPDATES, self.updates, event
            case SurvivorsConfirmed():
                return Stage.CONFIRM, self.confirmations, event.confirmation
            case SharesRevealed():
                return Stage.UNMASK, self.reveals, event.reveal

    def _check(self, event: Answer) -> None:
        """Refuse an answer that cannot be right, whoever sent it."""
        me = event.device_id
        match event:
            case KeysAdvertised(advert=advert) if advert.device_id != me:
                raise PeerError(f"{me} advertised keys as {advert.device_id}")
            case SharesSent(shares=shares):
                check_shares(self.graph, me, shares)
            case UpdateUploaded(size=size) if size != self.order.plan.upload_size:
                raise PeerError(
                    f"{me} uploaded {size} bytes, expected {self.order.plan.upload_size}"
                )
            case UpdateUploaded(digest=digest) if digest in {
                update.digest for update in self.updates.values()
            }:
                raise PeerError(f"{me} announced the update of another device as its own")
            case SurvivorsConfirmed(confirmation=confirmation) if confirmation.device_id != me:
                raise PeerError(f"{me} confirmed as {confirmation.device_id}")
            case SharesRevealed(reveal=reveal):
                check_reveal(self.graph, self.shares, self.updates, reveal)
            case _:
                pass

    # --- stages ---

    def _expected_and_answered(self) -> tuple[Iterable[str], Iterable[str]]:
        """Who takes part in the current stage, and who has answered in it."""
        match self.stage:
            case Stage.KEYS:
                return self.order.invited, self.adverts
            case Stage.SHARES:
                return self.graph, self.shares
            case Stage.UPDATES:
                return self.shares, self.updates
            case Stage.CONFIRM:
                return self.updates, self.confirmations
            case Stage.UNMASK:
                return self.confirmations, self.reveals
            case _:
                return (), ()

    def _advance(self, at: float) -> None:
        """Leave every stage that is complete."""
        while not self.stage.ended and self.stage is not Stage.AGGREGATE:
            if self.missing():
                return
            self._leave(at)
        if self.stage.ended and self.ended_at is None:
            self.ended_at = at

    def _leave(self, at: float) -> None:
        expected, answered = self._expected_and_answered()
        needed = max(self.order.min_cohort, self.order.plan.threshold + 1)
        count = len(list(answered))
        if self.stage is Stage.UNMASK:
            if not self._can_unmask():
                self._end(Stage.ABORTED, "too few devices revealed shares to unmask the sum")
                return
        elif count < needed:
            self._end(
                Stage.ABORTED,
                f"stage {self.stage.name}: {count} of {len(list(expected))} devices answered, "
                f"{needed} are needed",
            )
            return
        self.stage = Stage(self.stage.value + 1)
        self.stage_started_at = at
        if self.stage is Stage.SHARES:
            # The cohort is fixed; the round's own random name draws who masks against whom.
            plan = self.order.plan
            self.graph = neighbours(sorted(self.adverts), plan.num_neighbours, plan.round_id)

    def _can_unmask(self) -> bool:
        return can_unmask(
            plan=self.order.plan,
            graph=self.graph,
            sharers=self.shares,
            survivors=self.updates,
            reveals=self.reveals,
        )

    def _end(self, stage: Stage, reason: str) -> None:
        self.stage = stage
        self.reason = reason

    # --- instructions out ---

    def instruction(self, device_id: str) -> Instruction | None:
        """Say what a device has to do now; None if it has only to wait."""
        if device_id not in self.order.invited:
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
        match self.stage:
            case Stage.KEYS:
                return Advertise(order=self.order)
            case Stage.SHARES:
                return ShareSecrets(
                    adverts=tuple(self.adverts[peer] for peer in self.graph[device_id])
                )
            case Stage.UPDATES:
                return SendUpdate(shares=self._inbox(device_id))
            case Stage.CONFIRM:
                return ConfirmSurvivors(survivors=self.survivors)
            case _:
                return RevealShares(confirmations=self._confirmations_for(device_id))

    def _inbox(self, device_id: str) -> tuple[EncryptedShare, ...]:
        return tuple(
            share
            for peer in self.graph[device_id]
            for share in self.shares.get(peer, ())
            if share.receiver == device_id
        )

    def _confirmations_for(self, device_id: str) -> tuple[Confirmation, ...]:
        return tuple(
            self.confirmations[peer] for peer in self.graph[device_id] if peer in self.confirmations
        )
