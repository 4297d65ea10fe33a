"""A round whose updates nobody sees: masked sums, over the whole cohort or within groups of it.

Groups are drawn when the cohort is fixed. The masking graph joins no two of them, so each group is
a secure aggregation of its own, in step with the others; to a device its group is the round. What
the coordinator learns is one sum per group.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

from minga.federation.coordinator.rounds.events import (
    Answer,
    KeysAdvertised,
    PlainUpdateUploaded,
    SharesRevealed,
    SharesSent,
    SurvivorsConfirmed,
    UpdateUploaded,
)
from minga.federation.coordinator.rounds.instructions import (
    ConfirmSurvivors,
    Instruction,
    RevealShares,
    SendUpdate,
    ShareSecrets,
)
from minga.federation.coordinator.rounds.machine import Round
from minga.federation.coordinator.rounds.order import Stage
from minga.federation.errors import PeerError
from minga.federation.secagg.coordinator import can_unmask, check_reveal, check_shares
from minga.federation.secagg.graph import groups, neighbours
from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare, Reveal
from minga.federation.secagg.plan import RoundPlan


@dataclass(slots=True, kw_only=True)
class SecureRound(Round):
    """A round with secure aggregation."""

    FIRST_STAGE: ClassVar[Stage] = Stage.KEYS

    groups: tuple[tuple[str, ...], ...] = ()
    """The devices that advertised keys, by group; drawn when the stage KEYS ends."""
    graph: dict[str, tuple[str, ...]] = field(default_factory=dict)
    adverts: dict[str, Advert] = field(default_factory=dict)
    shares: dict[str, tuple[EncryptedShare, ...]] = field(default_factory=dict)
    confirmations: dict[str, Confirmation] = field(default_factory=dict)
    reveals: dict[str, Reveal] = field(default_factory=dict)

    # --- who is in ---

    @property
    def plan(self) -> RoundPlan:
        """The plan of each group."""
        assert isinstance(self.order.plan, RoundPlan)
        return self.order.plan

    @property
    def cohort(self) -> tuple[str, ...]:
        """The devices that advertised keys in time, sorted."""
        return tuple(sorted(self.graph or self.adverts))

    @property
    def sharers(self) -> tuple[str, ...]:
        """The devices whose shares were handed on, sorted."""
        return tuple(sorted(self.shares))

    def group_of(self, device_id: str) -> tuple[str, ...]:
        """Give the devices that a device is summed with, itself among them; none if it is out."""
        return next((group for group in self.groups if device_id in group), ())

    def survivors_with(self, device_id: str) -> tuple[str, ...]:
        """Give the devices of one's group whose updates are in the sum, sorted."""
        return tuple(sorted(self.updates.keys() & set(self.group_of(device_id))))

    # --- events in ---

    def _filing(self, event: Answer) -> tuple[Stage, dict[str, Any], Any]:
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
            case PlainUpdateUploaded():
                raise PeerError(f"{event.device_id} sent its update unmasked; nobody asked for it")

    def _check(self, event: Answer) -> None:
        me = event.device_id
        match event:
            case KeysAdvertised(advert=advert) if advert.device_id != me:
                raise PeerError(f"{me} advertised keys as {advert.device_id}")
            case SharesSent(shares=shares):
                check_shares(self.graph, me, shares)
            case UpdateUploaded(digest=digest):
                self._check_update(event)
                if digest in {update.digest for update in self.updates.values()}:
                    raise PeerError(f"{me} announced the update of another device as its own")
            case SurvivorsConfirmed(confirmation=confirmation) if confirmation.device_id != me:
                raise PeerError(f"{me} confirmed as {confirmation.device_id}")
            case SharesRevealed(reveal=reveal):
                check_reveal(self.graph, self.shares, self.updates, reveal)
            case _:
                pass

    # --- stages ---

    def _expected_and_answered(self) -> tuple[Collection[str], Collection[str]]:
        match self.stage:
            case Stage.KEYS:
                return self._invited, self.adverts
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

    def _leave(self, at: float) -> None:
        if self.stage is Stage.KEYS:
            self._draw_groups()
        if self.stage in (Stage.KEYS, Stage.SHARES, Stage.UPDATES):
            self._drop_small_groups()
        problem = self._problem()
        if problem:
            self._end(Stage.ABORTED, problem)
            return
        self.stage = Stage(self.stage.value + 1)
        self.stage_started_at = at

    def _problem(self) -> str:
        """Say why the round cannot go on after this stage; empty if it can."""
        expected, answered = self._expected_and_answered()
        if self.stage is Stage.UNMASK:
            able = all(self._can_unmask(group) for group in self.groups)
            return "" if able else "too few devices revealed shares to unmask the sum"
        needed = max(self.order.min_cohort, self._least)
        counts = [len(set(group) & set(answered)) for group in self.groups]
        count = sum(counts)
        if count >= needed and min(counts) >= self._least:
            return ""
        answered_by = f"stage {self.stage.name}: {count} of {len(expected)} devices answered"
        return f"{answered_by}, {needed} are needed"

    @property
    def _least(self) -> int:
        """The fewest members that a group can be unmasked with."""
        return self.plan.threshold + 1

    def _draw_groups(self) -> None:
        """Fix the cohort; the round's own random name draws who is summed and masks with whom."""
        plan = self.plan
        self.groups = groups(sorted(self.adverts), self.order.num_groups, plan.round_id)
        for group in self.groups:
            self.graph |= neighbours(group, plan.num_neighbours, plan.round_id)

    def _drop_small_groups(self) -> None:
        """Go on without groups that lost too many members; without any group there is no round."""
        _, answered = self._expected_and_answered()
        small = [group for group in self.groups if len(set(group) & set(answered)) < self._least]
        if len(small) == len(self.groups):
            return
        self.groups = tuple(group for group in self.groups if group not in small)
        for name in (name for group in small for name in group):
            self.lost.setdefault(name, "too few stayed in its group")
            for answers in (self.graph, self.shares, self.updates):
                answers.pop(name, None)

    def _can_unmask(self, group: Collection[str]) -> bool:
        members = set(group)
        return can_unmask(
            plan=self.plan,
            graph=self.graph,
            sharers=self.shares.keys() & members,
            survivors=self.updates.keys() & members,
            reveals=self.reveals,
        )

    # --- instructions out ---

    def _step_of(self, device_id: str) -> Instruction:
        match self.stage:
            case Stage.SHARES:
                return ShareSecrets(
                    adverts=tuple(self.adverts[peer] for peer in self.graph[device_id])
                )
            case Stage.UPDATES:
                return SendUpdate(shares=self._inbox(device_id))
            case Stage.CONFIRM:
                return ConfirmSurvivors(survivors=self.survivors_with(device_id))
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
