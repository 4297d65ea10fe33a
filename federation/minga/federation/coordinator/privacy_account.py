"""The fleet's privacy ledger, kept in the coordinator's database.

There is one for the whole fleet: a device's data does not become fresh because another campaign
asks for it. A round is charged before its sum is made, once, however often a crash has it made
again; what it was charged stays charged if it fails later.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from math import ceil
from typing import Protocol

from minga.federation import wire
from minga.federation.aggregation.ledger import (
    Concentrated,
    Ledger,
    Mechanism,
    Spent,
    load_accounting,
)
from minga.federation.aggregation.privacy import Privacy, distributed_rho
from minga.federation.coordinator.rounds import Round, SecureRound
from minga.federation.errors import PrivacyError
from minga.federation.v1 import federation_pb2 as pb


class Spendings(Protocol):
    """Where it is written down what rounds spent; the coordinator's `Store` is one."""

    def privacy_spent(self) -> Mapping[str, str]:
        """Give what rounds spent, oldest first: round -> spending."""
        ...

    def spend_privacy(self, round_id: str, spent: str) -> None:
        """Keep what a round spent; a round spends once.

        Raises:
            StorageError: it could not be written down.
        """
        ...


class PrivacyAccount:
    """What was spent, and whether a round may spend more."""

    def __init__(self, store: Spendings) -> None:
        self._store = store

    async def prepare(self, plan: pb.CampaignPlan) -> None:
        """Load what counts a private campaign's rounds, which takes a second, off the loop."""
        if plan.HasField("privacy"):
            with suppress(PrivacyError):  # it is missing: the campaign's next round says so
                await asyncio.to_thread(load_accounting)

    def ledger(self) -> Ledger:
        """Read what was spent.

        Raises:
            PrivacyError: it cannot be read; nothing may be spent then.
        """
        kept = [Ledger.from_json(text) for text in self._store.privacy_spent().values()]
        return Ledger(tuple(entry for one in kept for entry in one.entries))

    def require_left(self, plan: pb.CampaignPlan, num_rounds: int = 1) -> None:
        """Refuse to begin rounds that would spend more than is left.

        Raises:
            BudgetError: they would.
        """
        privacy = wire.privacy_from_wire(plan)
        if privacy is not None:
            self.ledger().spend(privacy.planned(), privacy.budget, num_rounds)

    def charge(self, plan: pb.CampaignPlan, round_: Round) -> None:
        """Spend what a round's sum will tell, unless that was done already.

        Raises:
            BudgetError: more devices were lost than expected, so that the sum would tell more than
                is left; it must not be made.
            StorageError: it could not be written down; nothing is spent.
        """
        privacy = wire.privacy_from_wire(plan)
        round_id = round_.order.round_id
        if privacy is None or round_id in self._store.privacy_spent():
            return
        mechanism = _mechanism(plan, privacy, round_)
        self.ledger().spend(mechanism, privacy.budget)
        self._store.spend_privacy(round_id, Ledger((Spent(mechanism=mechanism),)).to_json())

    def note(self, plan: pb.CampaignPlan, round_: Round, record: pb.Round) -> None:
        """Write into a round's record what was spent so far, if its campaign is private."""
        privacy, encoding = wire.privacy_from_wire(plan), round_.order.encoding
        if privacy is not None and encoding is not None:
            result = round_.result
            record.privacy.max_norm = encoding.max_norm if result is None else result.max_norm
            record.privacy.epsilon = self.ledger().epsilon(privacy.budget.delta)
            record.privacy.delta = privacy.budget.delta


def _mechanism(plan: pb.CampaignPlan, privacy: Privacy, round_: Round) -> Mechanism:
    """Say what a round's sum tells, with the devices that are in it."""
    encoding = round_.order.encoding
    if not isinstance(round_, SecureRound) or encoding is None or not encoding.variance:
        return privacy.planned()
    num_colluders = ceil(plan.colluder_share * round_.plan.max_cohort)
    rho = distributed_rho(
        plan=round_.plan,
        encoding=encoding,
        num_honest=len(round_.survivors) - num_colluders,
    )
    return Concentrated(rho=rho)
