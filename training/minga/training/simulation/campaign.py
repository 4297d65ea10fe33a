"""A campaign on virtual devices: rounds by the coordinator's own machines and arithmetic.

What decides is `minga.federation.coordinator`: which round comes next (`campaign`), when a stage
ends and who is lost (`rounds`), what becomes of updates (`aggregate`), what privacy costs
(`privacy_account`). What is here stands in the place of sockets, disk and clock: devices answer at
times that are computed, and their answers are in memory.
"""

from collections.abc import Sequence
from hashlib import sha256
from heapq import heapify, heappop, heappush
from typing import Final

import numpy as np

from minga.federation import wire
from minga.federation.aggregation.optimizers import initial_state
from minga.federation.coordinator.aggregate import Recipe, measured, take_step
from minga.federation.coordinator.campaign import Campaign
from minga.federation.coordinator.privacy_account import PrivacyAccount
from minga.federation.coordinator.rounds import (
    DeadlinePassed,
    DeviceLost,
    Event,
    PlainUpdateUploaded,
    Round,
    RoundFailed,
    SecureRound,
    Stage,
    SumComputed,
    UpdateUploaded,
    open_round,
)
from minga.federation.errors import CampaignError, FederationError
from minga.federation.limits import MAX_CONSECUTIVE_ABORTS
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Training, Work
from minga.training.simulation.fleet import Fleet, Reply, Upload
from minga.training.simulation.handshake import answers
from minga.training.simulation.lesson import Vector
from minga.training.simulation.state import State
from minga.training.simulation.uploads import HeldUploads

COHORT, DEVICES, NOISE = 4, 5, 6
"""Purposes of random numbers: each has its own stream in each round."""

CAMPAIGN_ID: Final = "0" * 32


class Spent:
    """What rounds spent of their privacy, in memory."""

    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def privacy_spent(self) -> dict[str, str]:
        """Give what rounds spent, oldest first."""
        return dict(self.entries)

    def spend_privacy(self, round_id: str, spent: str) -> None:
        """Keep what a round spent."""
        self.entries[round_id] = spent


class VirtualCampaign:
    """A campaign that is under way.

    Args:
        plan: as a coordinator would get it.
        fleet: the devices.
        first: what travels first.
        seed: of all that is drawn.

    Attributes:
        travelling: the newest model, and the control variate with SCAFFOLD.
        optimizer_state: what the server optimiser keeps.
        now: simulated seconds since the start.
        replies: of devices that still train, as a heap of (time, tie, reply).
    """

    def __init__(self, plan: pb.CampaignPlan, fleet: Fleet, first: Vector, seed: int) -> None:
        self.campaign = Campaign(
            campaign_id=CAMPAIGN_ID, plan=plan, model_digest=sha256(first.data).digest()
        )
        self.fleet = fleet
        self.travelling = first
        self.recipe = Recipe.of(plan)
        self.optimizer_state = initial_state(self.recipe.optimizer, first.size)
        self.spent = Spent()
        self.now = 0.0
        self.replies: list[tuple[float, int, Reply]] = []
        self._uploads: dict[str, Upload] = {}
        self._account = PrivacyAccount(self.spent)
        self._training = wire.config_from_wire(plan.training)
        self._seed = seed

    def next_round(self) -> pb.Round | None:
        """Play one round to its end, and give its record; None if all is done.

        Raises:
            CampaignError: several rounds in a row came to nothing.
            BudgetError: the privacy budget does not pay for another round.
        """
        campaign = self.campaign
        work = campaign.next_work()
        if work is None:
            return None
        if campaign.num_aborts_in_a_row >= MAX_CONSECUTIVE_ABORTS:
            reason = campaign.records[-1].reason
            raise CampaignError(f"{MAX_CONSECUTIVE_ABORTS} rounds in a row failed: {reason}")
        self._account.require_left(campaign.plan)
        invited = self._draw(work)
        order = campaign.next_order(
            invited,
            self.travelling.size,
            self._training,
            work=work,
            population=len(self.fleet.population) if campaign.plan.scaffold else 0,
            round_id=self._rng(COHORT).bytes(16).hex(),
        )
        round_ = campaign.open_round = open_round(order, self.now)
        self._play(round_)
        if round_.stage is Stage.AGGREGATE:
            round_.apply(self._aggregate(round_), self.now)
        record = campaign.record()
        self._account.note(campaign.plan, round_, record)
        campaign.close_round(record)
        self._settle(round_)
        return record

    def state(self) -> State:
        """Give what the campaign goes on from, between two rounds."""
        return State(
            travelling=self.travelling,
            optimizer_state=self.optimizer_state,
            now=self.now,
            replies=list(self.replies),
            spent=self.spent.privacy_spent(),
            kept=self.fleet.kept.copy(),
            records=list(self.campaign.records),
        )

    def resume(self, state: State) -> None:
        """Take a campaign that has just begun to where another one was."""
        self.travelling, self.optimizer_state = state.travelling, dict(state.optimizer_state)
        self.now, self.replies = state.now, list(state.replies)
        heapify(self.replies)
        self.spent.entries = dict(state.spent)
        self.fleet.kept = state.kept.copy()
        for record in state.records:
            self.campaign.add_record(record)
        self.campaign.model_digest = sha256(state.travelling.data).digest()

    # --- who is invited ---

    def _draw(self, work: Work) -> Sequence[str]:
        """Draw the devices of a round; those that go on from the round before are in anyway."""
        campaign, names = self.campaign, self.fleet.population.names
        busy = campaign.carried()
        going = sorted(busy) if isinstance(work, Training) else []
        order = self._rng(COHORT).permutation(len(names))
        missing = campaign.num_wanted - len(going)
        free = (names[number] for number in order if names[number] not in busy)
        return [*going, *(name for name, _ in zip(free, range(missing), strict=False))]

    def _rng(self, purpose: int) -> np.random.Generator:
        """Give the random numbers of the round that is next or open, for one purpose."""
        return np.random.default_rng([self._seed, purpose, len(self.campaign.records)])

    # --- the round ---

    def _play(self, round_: Round) -> None:
        """Let devices answer until the round has all that it needs, or ends."""
        if isinstance(round_, SecureRound):
            self._shake_hands(round_)
        if round_.stage is Stage.UPDATES:
            self._invite(round_)
        while round_.stage is Stage.UPDATES:
            deadline = round_.deadline()
            assert deadline is not None
            if not self.replies or self.replies[0][0] > deadline:
                self.now = deadline
                round_.apply(DeadlinePassed(stage=round_.stage), self.now)
                continue
            self.now, _, reply = heappop(self.replies)
            if reply.device_id not in round_.lost:
                round_.apply(self._event(round_, reply), self.now)
        if isinstance(round_, SecureRound):
            self._shake_hands(round_)

    def _shake_hands(self, round_: SecureRound) -> None:
        """Answer all stages that carry secrets, until updates are due or all is there."""
        while not round_.stage.ended and round_.stage not in (Stage.UPDATES, Stage.AGGREGATE):
            for event in answers(round_, round_.missing()):
                round_.apply(event, self.now)

    def _invite(self, round_: Round) -> None:
        """Let those train who do not train yet, and see when each will answer."""
        order = round_.order
        bases = order.buffer.bases if order.buffer else {}
        invited = [name for name in round_.missing() if name not in bases]
        act = self.fleet.train if isinstance(order.work, Training) else self.fleet.measure
        rng = self._rng(DEVICES)
        replies = act(invited, order, self.travelling, rng)
        # Those that answer at the same moment do so in random order, not by name.
        for reply, tie in zip(replies, rng.permutation(len(replies)), strict=True):
            heappush(self.replies, (self.now + reply.after_s, int(tie), reply))

    def _event(self, round_: Round, reply: Reply) -> Event:
        """Say what a device's answer is to the round."""
        name, upload = reply.device_id, reply.upload
        if upload is None:
            return DeviceLost(device_id=name, reason=reply.reason)
        self._uploads[name] = upload
        size, digest = round_.order.plan.upload_size, name.encode()
        if isinstance(round_, SecureRound):
            return UpdateUploaded(device_id=name, digest=digest, size=size)
        return PlainUpdateUploaded(
            device_id=name, digest=digest, size=size, num_examples=upload.weight
        )

    def _aggregate(self, round_: Round) -> SumComputed | RoundFailed:
        """Make the next model of the round's updates, or the mean of what devices measured."""
        try:
            self._account.charge(self.campaign.plan, round_)
            uploads = HeldUploads(self._uploads)
            if not isinstance(round_.order.work, Training):
                return measured(round_, uploads, b"")
            layout = self.fleet.parts.travelling
            tensors = layout.unflatten(self.travelling)
            state = {name: vector.copy() for name, vector in self.optimizer_state.items()}
            taken = take_step(
                round_,
                uploads,
                self.recipe,
                model=((name, tensors[name]) for name in layout.names),
                state=state,
                random_bytes=self._rng(NOISE).bytes,
            )
        except FederationError as error:
            return RoundFailed(reason=f"the sum failed: {error}")
        self.travelling, self.optimizer_state = taken.values, state
        digest = self.campaign.model_digest = sha256(taken.values.data).digest()
        return SumComputed(
            model_digest=digest,
            total_weight=taken.total_weight,
            rejected=taken.rejected,
            max_norm=taken.max_norm,
        )

    def _settle(self, round_: Round) -> None:
        """Tell devices how the round ended, and drop what only it needed."""
        going = self.campaign.carried()
        counted = round_.survivors if round_.stage is Stage.COMMITTED else ()
        over = [name for name in self.fleet.kept.staged if name not in going]
        if isinstance(round_.order.work, Training):
            self.fleet.settle(over, counted)
        self._uploads.clear()
        self.replies = [entry for entry in self.replies if entry[2].device_id in going]
        heapify(self.replies)
