"""One campaign as it stands: its plan, the records of rounds that are over, the open round."""

import math
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from minga.federation import wire
from minga.federation.aggregation.rules import Mean, Rule
from minga.federation.blobs import BlobStore
from minga.federation.coordinator import journal
from minga.federation.coordinator.rounds import Base, Buffer, Round, RoundOrder, Timeouts
from minga.federation.coordinator.store import CampaignRow, RoundRow, Store
from minga.federation.errors import CampaignError, FederationError, PeerError, PrivacyError
from minga.federation.identity import is_name
from minga.federation.limits import (
    DETAILED_ROUNDS,
    MAX_COHORT,
    MAX_CONSECUTIVE_ABORTS,
    MAX_STALENESS,
    STATUS_DETAIL_BYTES,
)
from minga.federation.parameters import Layout, read_layout
from minga.federation.parts import CONTROL, is_personal
from minga.federation.secagg.errors import PlanError
from minga.federation.trainer import TrainingConfig, proximal_mu
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import TRAINING, Evaluation, Training, Work

RUNNING = pb.CAMPAIGN_STATE_RUNNING


@dataclass(slots=True, eq=False, kw_only=True)
class Campaign:
    """One campaign. Of a round that is over only its record is kept: no shares, no keys."""

    campaign_id: str
    plan: pb.CampaignPlan
    model_digest: bytes
    optimizer_digest: bytes = b""
    """The state that the server optimiser goes on with; empty if it keeps none."""
    state: int = RUNNING
    reason: str = ""
    records: list[pb.Round] = field(default_factory=list, init=False)
    """Of rounds that are over; grows by `add_record` alone."""
    num_committed: int = field(default=0, init=False)
    """How many rounds are in the model."""
    num_aborts_in_a_row: int = field(default=0, init=False)
    """How many rounds failed since the last one that was committed."""
    open_round: Round | None = None
    bytes_received: int = 0
    """What the open round moved since this process knows it."""
    bytes_sent: int = 0

    @classmethod
    def load(cls, store: Store, row: CampaignRow) -> "Campaign":
        """Read a campaign; a round that was under way is rebuilt from its events."""
        campaign = cls(
            campaign_id=row.campaign_id,
            plan=pb.CampaignPlan.FromString(row.plan),
            model_digest=row.model_digest,
            optimizer_digest=row.optimizer_digest,
            state=row.state,
            reason=row.reason,
        )
        for round_row in store.rounds(row.campaign_id):
            if round_row.record is not None:
                campaign.add_record(pb.Round.FromString(round_row.record))
            else:
                order = campaign.order_of(round_row)
                events = store.events(round_row.round_id)
                campaign.open_round = journal.replay(order, round_row.started_at, events)
        return campaign

    @property
    def is_running(self) -> bool:
        """True until it completed, failed or was cancelled."""
        return self.state == RUNNING

    @property
    def is_over(self) -> bool:
        """True when nothing is left to do, not even to tell the devices of the last round."""
        return not self.is_running and self.open_round is None

    def _trainings(self) -> Iterator[pb.Round]:
        return (r for r in self.records if r.work != pb.ROUND_WORK_EVALUATION)

    def next_work(self) -> Work | None:
        """Say what the next round asks; None if all is done."""
        query = wire.query_of(self.plan)
        if query is not None:
            return query.next_question(
                [r.answer for r in self.records if r.stage == pb.ROUND_STAGE_COMMITTED]
            )
        if self._evaluation_is_due():
            return wire.evaluation_of(self.plan)
        return None if self.num_committed >= self.plan.num_rounds else Training()

    def _evaluation_is_due(self) -> bool:
        """Tell whether the model is to be measured as it is; given up after some aborted rounds."""
        number, every = self.num_committed, self.plan.evaluate_every
        if not number or not self.plan.HasField("evaluation"):
            return False
        if number < self.plan.num_rounds and (not every or number % every):
            return False
        tried = [
            record.stage
            for record in self.records
            if record.work == pb.ROUND_WORK_EVALUATION and record.number == number
        ]
        return pb.ROUND_STAGE_COMMITTED not in tried and len(tried) < MAX_CONSECUTIVE_ABORTS

    @property
    def num_wanted(self) -> int:
        """How many devices a round invites if they are there: the cohort, and some for losses."""
        return _num_wanted(self.plan)

    def next_order(
        self,
        devices: Sequence[str],
        num_values: int,
        training: TrainingConfig,
        *,
        work: Work = TRAINING,
        population: int = 0,
        round_id: str = "",
    ) -> RoundOrder:
        """Fix what the next round is to do, with as many of some devices as a plan exists for.

        Args:
            devices: who can be invited, in any order.
            num_values: of the model that travels.
            training: what the devices' training is told.
            work: what is asked.
            population: how many devices there are, here or not.
            round_id: 32 hexadecimal digits that no other round has; drawn if none are given.

        Raises:
            PlanError: there is no plan, not even for the smallest cohort.
        """
        round_id = round_id or secrets.token_hex(16)
        while True:
            devices = devices[: _invitable(self.plan, len(devices))]
            try:
                plan, encoding = wire.round_plan(
                    self._plan_now(),
                    round_id=round_id,
                    model_digest=self.model_digest,
                    training=training,
                    num_values=num_values,
                    num_invited=len(devices),
                    work=work,
                )
                break
            # Shares of a cohort that are to be borne round badly for some sizes.
            except (PlanError, PrivacyError):
                if len(devices) <= self.plan.min_cohort:
                    raise
                devices = devices[:-1]
        return self._order(
            round_id=round_id,
            number=self.num_committed + (not isinstance(work, Evaluation)),
            plan=plan,
            invited=tuple(sorted(devices)),
            model_digest=self.model_digest,
            training=training,
            work=work,
            population=population,
            encoding=encoding,
        )

    def carried(self) -> dict[str, Base]:
        """Give the devices that go on from the last committed round into the next, with bases."""
        has_more = self.is_running and self.num_committed < self.plan.num_rounds
        if not self.plan.HasField("buffer") or not has_more:
            return {}
        trainings = list(self._trainings())
        if not trainings or trainings[-1].stage != pb.ROUND_STAGE_COMMITTED:
            return {}
        last = trainings[-1]
        by_id = {record.round_id: record for record in trainings}
        going = set(last.invited) - set(last.survivors) - last.lost.keys()
        return {name: _base(by_id[last.bases.get(name, last.round_id)]) for name in going}

    def bases(self) -> list[Base]:
        """Give the bases of all devices that train now, so that they can start again."""
        round_ = self.open_round
        open_bases = round_.order.buffer.bases if round_ and round_.order.buffer else {}
        return [*self.carried().values(), *open_bases.values()]

    def verdict(self, device_id: str, round_id: str) -> pb.Round | None:
        """Give the record that says how a device's part in a round ended; None if it is unknown.

        A device that carried over ended in a later round than the one that it was invited to.
        """
        for record in reversed(self.records if self.plan.HasField("buffer") else []):
            base = record.bases.get(device_id, record.round_id)
            if base == round_id and device_id in record.invited:
                return record
        return None

    def _buffer(self, number: int, invited: Collection[str]) -> Buffer | None:
        if not self.plan.HasField("buffer"):
            return None
        return Buffer(
            max_staleness=self.plan.buffer.max_staleness,
            carries=number < self.plan.num_rounds,
            bases={name: base for name, base in self.carried().items() if name in invited},
        )

    def _plan_now(self) -> pb.CampaignPlan:
        """Give the plan with the bound on updates' lengths that the newest round left."""
        plan = pb.CampaignPlan()
        plan.CopyFrom(self.plan)
        if self.records and self.records[-1].privacy.max_norm:
            plan.privacy.max_norm = self.records[-1].privacy.max_norm
        return plan

    def order_of(self, row: RoundRow) -> RoundOrder:
        """Read what a round of this campaign was to do."""
        invite = pb.RoundInvite.FromString(row.invite)
        return self._order(
            round_id=row.round_id,
            number=row.number,
            plan=wire.plan_of_invite(invite),
            invited=row.invited,
            model_digest=invite.model_digest,
            training=wire.config_from_wire(invite.training),
            work=wire.work_of_invite(invite),
            population=invite.population,
            encoding=wire.encoding_of_invite(invite),
        )

    def _order(self, **values: Any) -> RoundOrder:
        """Add what follows from the campaign's plan, and from its rounds so far."""
        plan, is_training = self.plan, isinstance(values["work"], Training)
        return RoundOrder(
            min_cohort=plan.min_cohort,
            goal=plan.buffer.size if is_training and plan.HasField("buffer") else plan.cohort,
            buffer=self._buffer(values["number"], values["invited"]) if is_training else None,
            min_examples=plan.requirements.min_examples,
            method=wire.method_of(plan),
            model_name=plan.model_name,
            campaign_id=self.campaign_id,
            num_groups=wire.num_groups(plan),
            timeouts=Timeouts(
                keys_s=plan.invite_timeout_s,
                stage_s=plan.stage_timeout_s,
                updates_s=plan.training_timeout_s,
            ),
            **values,
        )

    def record(self) -> pb.Round:
        """Give the open round as it goes into the records."""
        assert self.open_round is not None
        return wire.round_to_wire(self.open_round, self.bytes_received, self.bytes_sent)

    def close_round(self, record: pb.Round) -> None:
        """Put the open round's record in its place."""
        self.add_record(record)
        self.open_round = None
        self.bytes_received = self.bytes_sent = 0

    def add_record(self, record: pb.Round) -> None:
        """Take the record of a round that is over; one long past loses its devices' names."""
        self.records.append(record)
        if record.work != pb.ROUND_WORK_EVALUATION:
            is_committed = record.stage == pb.ROUND_STAGE_COMMITTED
            self.num_committed += is_committed
            self.num_aborts_in_a_row = 0 if is_committed else self.num_aborts_in_a_row + 1
        if len(self.records) > DETAILED_ROUNDS:
            past = -DETAILED_ROUNDS - 1
            self.records[past] = wire.without_names(self.records[past])

    def describe(self, detail_bytes: int = STATUS_DETAIL_BYTES) -> pb.Campaign:
        """Give the campaign as it goes over the wire.

        Args:
            detail_bytes: how much of it may be rounds with all their devices' names: the oldest
                lose them first, the open one never does. So a campaign fits into a message,
                however long it gets.
        """
        rounds = [] if self.open_round is None else [self.record()]
        for record in reversed(self.records):
            has_names = detail_bytes > 0
            detail_bytes -= record.ByteSize() if has_names else 0
            rounds.append(record if has_names else wire.without_names(record))
        return pb.Campaign(
            campaign_id=self.campaign_id,
            plan=self.plan,
            state=self.state,  # type: ignore[arg-type]
            reason=self.reason,
            model_digest=self.model_digest,
            rounds=reversed(rounds),
        )


def model_layout(blobs: BlobStore, plan: pb.CampaignPlan, model_digest: bytes) -> Layout:
    """Read which tensors a campaign's model has; a query has none.

    Raises:
        CampaignError: it is not uploaded, or no model.
    """
    if plan.HasField("query"):
        return Layout(names=(), shapes=())
    try:
        return read_layout(blobs.path(model_digest))
    except FederationError as error:
        raise CampaignError(f"the campaign's model cannot be used: {error}") from error


def _base(record: pb.Round) -> Base:
    return Base(round_id=record.round_id, number=record.number, model_digest=record.model_digest)


def _num_wanted(plan: pb.CampaignPlan) -> int:
    return math.ceil(plan.cohort * (1 + plan.over_selection))


def _invitable(plan: pb.CampaignPlan, num_devices: int) -> int:
    """Say how many of some devices a round can invite: groups are of equal size."""
    return num_devices - num_devices % wire.num_groups(plan)


def require_possible(plan: pb.CampaignPlan, layout: Layout) -> None:
    """Refuse a campaign that no round could be made of.

    Args:
        plan: what is asked for.
        layout: of its model.

    Raises:
        CampaignError: the numbers cannot work.
    """
    _require_numbers(plan)
    _require_parts(plan, layout)
    num_values = layout.num_values * (2 if plan.scaffold else 1)
    for count in (_num_wanted(plan), plan.cohort, plan.min_cohort):
        try:
            for work in _works(plan):
                wire.round_plan(
                    plan,
                    round_id="00" * 16,
                    model_digest=plan.model_digest,
                    training=wire.config_from_wire(plan.training),
                    num_values=num_values,
                    num_invited=count,
                    work=work,
                )
        except (PlanError, PeerError, PrivacyError) as error:
            raise CampaignError(f"no round can work with {count} devices: {error}") from error
    try:
        wire.optimizer_from_wire(plan)
        rule = wire.rule_from_wire(plan)
        rule.require_enough(plan.min_cohort if wire.is_plain(plan) else wire.num_groups(plan))
        if plan.HasField("privacy"):
            _require_private(plan, rule)
        if plan.scaffold and rule != Mean():
            raise CampaignError("scaffold takes the mean: control variates are means over devices")
        proximal_mu(wire.config_from_wire(plan.training))
    except (ValueError, PeerError) as error:
        raise CampaignError(f"the campaign cannot work: {error}") from error


def _require_query(plan: pb.CampaignPlan) -> None:
    """Refuse queries beside training, and those that would show one device's answer."""
    if wire.is_plain(plan):
        raise CampaignError("queries are answered by sums alone; the campaign has to be secure")
    others = plan.HasField("evaluation") or plan.HasField("flower_strategy")
    if others or plan.model_digest or plan.scaffold or plan.personal:
        raise CampaignError("a campaign trains or queries, one of both; a query has no model")


def _require_buffer(plan: pb.CampaignPlan) -> None:
    """Refuse rounds without waiting where something depends on who is in which round."""
    if not wire.is_plain(plan):
        raise CampaignError(
            "buffered rounds are for plain campaigns: masks cancel only among devices that are in "
            "the same sum, and devices that finish in different rounds are not"
        )
    if plan.scaffold:
        raise CampaignError(
            "buffered rounds and scaffold do not go together: a control variate belongs to the "
            "model that its device started from"
        )
    if plan.over_selection:
        raise CampaignError("buffered rounds wait for the fastest anyway; leave over_selection out")
    size, stalest = plan.buffer.size, plan.buffer.max_staleness
    if not plan.min_cohort <= size <= plan.cohort:
        raise CampaignError(
            f"the buffer holds {size} updates; that must be from min_cohort {plan.min_cohort} to "
            f"cohort {plan.cohort}"
        )
    if stalest > MAX_STALENESS:
        raise CampaignError(f"max_staleness is {stalest}; {MAX_STALENESS} is the most")


def _require_parts(plan: pb.CampaignPlan, layout: Layout) -> None:
    """Refuse a model with tensors that must not travel, or that would be taken for others."""
    try:
        method = wire.method_of(plan)
    except PeerError as error:
        raise CampaignError(f"the campaign cannot work: {error}") from error
    for name in layout.names:
        if is_personal(name, method.personal):
            raise CampaignError(f"tensor {name!r} is personal; take it out of the model first")
        if name.startswith(CONTROL):
            raise CampaignError(f"tensor {name!r} is named as a control variate; rename it")
    if method.keeps_state and not is_name(plan.model_name):
        raise CampaignError("devices keep tensors under the model's name: use a-z, 0-9 and '-'")


def _works(plan: pb.CampaignPlan) -> Iterator[Work]:
    """Give all kinds of work that a campaign's rounds ask."""
    query = wire.query_of(plan)
    if query is not None:
        yield from filter(None, [query.next_question([])])
        return
    yield Training()
    evaluation = wire.evaluation_of(plan)
    if evaluation is not None:
        yield evaluation


def _require_private(plan: pb.CampaignPlan, rule: Rule) -> None:
    """Insist on what bounds one device's influence, where that is promised."""
    if rule != Mean():
        raise CampaignError("privacy takes the mean: it bounds what one update changes in it")
    if wire.num_groups(plan) > 1:
        raise CampaignError("privacy takes one sum: several groups would need noise each")
    beside = (plan.HasField("evaluation"), plan.HasField("query"), plan.HasField("buffer"))
    if plan.scaffold or any(beside):
        raise CampaignError(
            "privacy counts updates of whole rounds: control variates, evaluations, queries and "
            "buffers would tell of data without noise, or otherwise than it counts"
        )
    if plan.privacy.distributed and wire.is_plain(plan):
        raise CampaignError(
            "devices add noise in secure rounds; in plain ones the coordinator does"
        )
    privacy = wire.privacy_from_wire(plan)
    if privacy is not None and privacy.clip is not None and not privacy.is_distributed:
        privacy.clip.update_noise(privacy.noise_multiplier, plan.min_cohort)


def _require_numbers(plan: pb.CampaignPlan) -> None:
    positive = (
        "num_rounds",
        "server_learning_rate",
        "invite_timeout_s",
        "stage_timeout_s",
        "training_timeout_s",
    )
    for name in positive:
        if not 0 < getattr(plan, name) < math.inf:
            raise CampaignError(f"{name} is {getattr(plan, name)}; it must be positive and finite")
    if plan.min_cohort > plan.cohort:
        raise CampaignError(f"min_cohort {plan.min_cohort} is above cohort {plan.cohort}")
    if not 0 <= plan.over_selection <= 1:
        raise CampaignError(f"over_selection is {plan.over_selection}; give a share from 0 to 1")
    if _num_wanted(plan) > MAX_COHORT:
        raise CampaignError(
            f"{_num_wanted(plan)} devices would be invited; a round holds {MAX_COHORT} at most"
        )
    if plan.HasField("query"):
        _require_query(plan)
    if plan.HasField("buffer"):
        _require_buffer(plan)
    if wire.is_plain(plan) and wire.num_groups(plan) > 1:
        raise CampaignError("groups are for secure rounds; a plain one shows every update anyway")
    if _invitable(plan, plan.min_cohort) != plan.min_cohort:
        raise CampaignError(
            f"min_cohort {plan.min_cohort} does not make {plan.num_groups} groups of equal size"
        )
