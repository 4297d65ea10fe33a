"""Drives campaigns: the shell around `rounds.Round` that owns store, blobs, clock and pushes.

One campaign runs at a time. All of this lives in one event loop. A state change is stored first
and told second, so a coordinator that is killed at any point goes on where it was: it reads its
campaign, replays the open round's events and gives every device the instruction that follows from
the state.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from minga.federation import wire
from minga.federation.blobs import BlobStore
from minga.federation.coordinator import journal
from minga.federation.coordinator.aggregate import aggregate
from minga.federation.coordinator.hub import Connection, Hub, Signal, wait_for_any
from minga.federation.coordinator.metrics import Metrics
from minga.federation.coordinator.rounds import (
    DeadlinePassed,
    DeviceEvent,
    DeviceLost,
    Event,
    KeysAdvertised,
    Round,
    RoundFailed,
    RoundOrder,
    Stage,
    SumComputed,
    SurvivorsConfirmed,
    Timeouts,
    UpdateUploaded,
)
from minga.federation.coordinator.store import CampaignRow, RoundRow, Store
from minga.federation.errors import CampaignError, FederationError, PeerError
from minga.federation.limits import MAX_CONSECUTIVE_ABORTS
from minga.federation.parameters import Layout, from_bytes
from minga.federation.secagg.coordinator import check_advert, check_confirmation
from minga.federation.secagg.plan import RoundPlan
from minga.federation.secagg.signing import Verifier
from minga.federation.v1 import federation_pb2 as pb

_log = logging.getLogger(__name__)

_RUNNING = pb.CAMPAIGN_STATE_RUNNING


@dataclass(slots=True, eq=False)
class Traffic:
    """Bytes that a round moved."""

    received: int = 0
    sent: int = 0


@dataclass(slots=True, eq=False)
class Campaign:
    """One campaign as it stands."""

    campaign_id: str
    started_at: float
    plan: pb.CampaignPlan
    state: int
    model_digest: bytes
    reason: str = ""
    rounds: list[Round] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)

    @property
    def num_committed(self) -> int:
        """How many rounds are in the model."""
        return sum(round_.stage is Stage.COMMITTED for round_ in self.rounds)

    @property
    def num_aborts_in_a_row(self) -> int:
        """How many rounds failed since the last one that was committed."""
        count = 0
        for round_ in reversed(self.rounds):
            if round_.stage is Stage.COMMITTED:
                break
            count += round_.stage is Stage.ABORTED
        return count

    @property
    def open_round(self) -> Round | None:
        """The round that is under way."""
        if self.rounds and not self.rounds[-1].stage.ended:
            return self.rounds[-1]
        return None

    def describe(self) -> pb.Campaign:
        """Give the campaign as it goes over the wire."""
        message = pb.Campaign(
            campaign_id=self.campaign_id,
            plan=self.plan,
            state=self.state,  # type: ignore[arg-type]
            reason=self.reason,
            model_digest=self.model_digest,
        )
        for round_ in self.rounds:
            traffic = self.traffic[round_.order.round_id]
            message.rounds.append(wire.round_to_wire(round_, traffic.received, traffic.sent))
        return message


class Campaigns:
    """All campaigns of one coordinator, and the loop that runs them."""

    def __init__(
        self,
        *,
        store: Store,
        blobs: BlobStore,
        hub: Hub,
        verifier: Verifier,
        clock: Callable[[], float],
        metrics: Metrics,
        reconnect_grace_s: float,
    ) -> None:
        self.changed = Signal()
        self._store = store
        self._blobs = blobs
        self._hub = hub
        self._verifier = verifier
        self._clock = clock
        self._metrics = metrics
        self._grace_s = reconnect_grace_s
        self._told: dict[str, tuple[Connection, type]] = {}
        self._campaigns = {row.campaign_id: self._load(row) for row in store.campaigns()}
        for campaign in self._campaigns.values():
            if campaign.state != _RUNNING and campaign.open_round is not None:
                self._close_round(campaign, campaign.open_round)

    # --- for operators ---

    def all(self) -> list[Campaign]:
        """Give all campaigns, oldest first."""
        return list(self._campaigns.values())

    def start(self, plan: pb.CampaignPlan) -> Campaign:
        """Store a new campaign; the loop takes it up at once.

        Raises:
            CampaignError: another one is running, or the plan cannot work.
        """
        running = self._running()
        if running is not None:
            raise CampaignError(
                f"campaign {running.campaign_id} is running; wait for it or cancel it first"
            )
        _require_possible(plan)
        self._round_plan(plan, "0" * 32, plan.model_digest, plan.cohort)
        now = self._clock()
        campaign = Campaign(secrets.token_hex(6), now, plan, _RUNNING, plan.model_digest)
        self._store.add_campaign(
            CampaignRow(
                campaign_id=campaign.campaign_id,
                started_at=now,
                plan=plan.SerializeToString(),
                state=_RUNNING,
                reason="",
                model_digest=plan.model_digest,
            )
        )
        self._campaigns[campaign.campaign_id] = campaign
        self.changed.fire()
        return campaign

    def get(self, campaign_id: str) -> Campaign:
        """Give one campaign.

        Raises:
            CampaignError: there is none of that name.
        """
        campaign = self._campaigns.get(campaign_id)
        if campaign is None:
            raise CampaignError(f"there is no campaign {campaign_id!r}; `minga status` lists them")
        return campaign

    def cancel(self, campaign_id: str) -> None:
        """End a campaign now; what was committed stays."""
        campaign = self.get(campaign_id)
        if campaign.state == _RUNNING:
            self._end(campaign, pb.CAMPAIGN_STATE_CANCELLED, "cancelled by an operator")

    async def watch(self, campaign_id: str) -> AsyncIterator[pb.Campaign]:
        """Give the campaign now and after each change, until it has ended."""
        campaign = self.get(campaign_id)
        while True:
            change = self.changed.next()
            described = campaign.describe()
            yield described
            if described.state != _RUNNING:
                return
            await change.wait()

    # --- for devices ---

    def take(self, event: DeviceEvent, round_id: str, size: int) -> None:
        """Take a device's answer.

        Args:
            event: the answer.
            round_id: the round that it names.
            size: bytes that it took on the wire, for the record.

        Raises:
            PeerError: it is refused; nothing changed.
        """
        campaign, round_ = self._open(round_id)
        self._check_proof(round_, event)
        self._record(campaign, round_, event)
        campaign.traffic[round_id].received += size

    def _check_proof(self, round_: Round, event: DeviceEvent) -> None:
        """Refuse what its device did not sign or upload, before it costs others their round."""
        plan = round_.order.plan
        match event:
            case KeysAdvertised(advert=advert):
                check_advert(plan, self._verifier, advert)
            case SurvivorsConfirmed(device_id=device_id, confirmation=confirmation):
                signer = round_.adverts.get(device_id)
                if signer is not None:
                    check_confirmation(plan, self._verifier, signer, round_.survivors, confirmation)
            case UpdateUploaded(digest=digest, size=size):
                if not self._blobs.has(digest) or self._blobs.size(digest) != size:
                    raise PeerError("the update that was announced is not uploaded")
            case _:
                pass

    def count_transfer(self, device_id: str, *, received: int = 0, sent: int = 0) -> None:
        """Add a device's blob bytes to the record of the round that it is in."""
        campaign = self._running()
        round_ = campaign.open_round if campaign else None
        if campaign is not None and round_ is not None and device_id in round_.order.invited:
            traffic = campaign.traffic[round_.order.round_id]
            traffic.received += received
            traffic.sent += sent

    def greet(self, connection: Connection, round_id: str) -> None:
        """Tell a device that comes back how its round ended, if it has; the loop does the rest."""
        if not round_id:
            return
        for campaign in self._campaigns.values():
            for round_ in campaign.rounds:
                if round_.order.round_id == round_id:
                    if round_.stage.ended:
                        self._push_to(campaign, round_, connection)
                    return
        connection.send(wire.unknown_round(round_id))

    def expects_upload(self, device_id: str, size: int) -> bool:
        """True if the open round waits for a masked update of this size from a device."""
        campaign = self._running()
        round_ = campaign.open_round if campaign else None
        return (
            round_ is not None
            and round_.stage is Stage.UPDATES
            and device_id in round_.missing()
            and size == round_.order.plan.upload_size
        )

    def blobs_in_use(self) -> set[bytes]:
        """Give the digests of all that campaigns started from, came to, or wait for."""
        kept = set[bytes]()
        for campaign in self._campaigns.values():
            kept |= {campaign.plan.model_digest, campaign.model_digest}
            if campaign.open_round is not None:
                kept |= {update.digest for update in campaign.open_round.updates.values()}
        return kept

    def needs_blob(self, digest: bytes) -> bool:
        """True if a device may fetch this blob: it is the model of a running campaign."""
        campaign = self._running()
        return campaign is not None and digest == campaign.model_digest

    # --- the loop ---

    async def run(self) -> None:
        """Run campaigns, one after the other, for ever."""
        while True:
            change = self.changed.next()
            campaign = self._running()
            if campaign is None:
                await change.wait()
                continue
            try:
                await self._run_campaign(campaign)
            except FederationError as error:
                _log.exception("campaign %s failed", campaign.campaign_id)
                self._end(campaign, pb.CAMPAIGN_STATE_FAILED, str(error))

    async def _run_campaign(self, campaign: Campaign) -> None:
        while campaign.state == _RUNNING:
            if campaign.num_committed >= campaign.plan.num_rounds:
                self._end(campaign, pb.CAMPAIGN_STATE_COMPLETED, "")
            elif campaign.num_aborts_in_a_row >= MAX_CONSECUTIVE_ABORTS:
                reason = f"{MAX_CONSECUTIVE_ABORTS} rounds in a row failed: "
                reason += campaign.rounds[-1].reason
                self._end(campaign, pb.CAMPAIGN_STATE_FAILED, reason)
            elif campaign.open_round is not None:
                await self._run_round(campaign, campaign.open_round)
            else:
                await self._begin_round(campaign)

    async def _begin_round(self, campaign: Campaign) -> None:
        devices = await self._gather(campaign)
        if not devices:
            return
        number = campaign.num_committed + 1
        round_id = secrets.token_hex(16)
        plan = self._round_plan(campaign.plan, round_id, campaign.model_digest, len(devices))
        order = RoundOrder(
            round_id=round_id,
            number=number,
            plan=plan,
            invited=tuple(devices),
            min_cohort=campaign.plan.min_cohort,
            model_digest=campaign.model_digest,
            training=wire.config_from_wire(campaign.plan.training),
            timeouts=_timeouts(campaign.plan),
        )
        now = self._clock()
        self._store.add_round(
            RoundRow(
                round_id=round_id,
                campaign_id=campaign.campaign_id,
                number=number,
                started_at=now,
                invited=order.invited,
                invite=wire.invite_to_wire(order).SerializeToString(),
            )
        )
        campaign.rounds.append(Round(order=order, started_at=now))
        campaign.traffic[round_id] = Traffic()
        self.changed.fire()

    async def _gather(self, campaign: Campaign) -> Sequence[str]:
        """Wait for the cohort, or after the invitation's time for the minimum, and draw it."""
        plan = campaign.plan
        waited_until = self._clock() + plan.invite_timeout_s
        while campaign.state == _RUNNING:
            changes = self._changes()
            present = [c.device_id for c in self._hub.connected(plan.group) if c.trains]
            left_s = waited_until - self._clock()
            if len(present) >= plan.cohort or (left_s <= 0 and len(present) >= plan.min_cohort):
                secrets.SystemRandom().shuffle(present)
                campaign.reason = ""
                return sorted(present[: plan.cohort])
            reason = f"waiting for devices: {len(present)} of {plan.cohort} are connected"
            if reason != campaign.reason:
                campaign.reason = reason
                self.changed.fire()
                continue
            await wait_for_any(changes, left_s if left_s > 0 else None)
        return ()

    async def _run_round(self, campaign: Campaign, round_: Round) -> None:
        while not round_.stage.ended and campaign.state == _RUNNING:
            changes = self._changes()
            self._push(campaign, round_)
            if round_.stage is Stage.AGGREGATE:
                await self._aggregate(campaign, round_)
            else:
                await wait_for_any(changes, self._time_left(round_))
                self._expire(campaign, round_)
        self._close_round(campaign, round_)

    async def _aggregate(self, campaign: Campaign, round_: Round) -> None:
        """Unmask the sum off the loop, then commit."""
        rate = campaign.plan.server_learning_rate
        try:
            result = await asyncio.to_thread(aggregate, round_, self._blobs, rate)
        except FederationError as error:
            self._record(campaign, round_, RoundFailed(reason=f"the sum failed: {error}"))
        else:
            self._record(campaign, round_, result)

    def _changes(self) -> list[asyncio.Event]:
        """Whatever may move a round: an event here, a device that comes or goes."""
        return [self.changed.next(), self._hub.changed.next()]

    def _time_left(self, round_: Round) -> float | None:
        """Seconds until the stage's deadline, or until an absent device counts as lost."""
        alarms = [] if round_.deadline is None else [round_.deadline]
        for device_id in round_.missing():
            gone_since = self._hub.gone_since(device_id)
            if gone_since is not None:
                alarms.append(gone_since + self._grace_s)
        return max(0.0, min(alarms) - self._clock()) if alarms else None

    def _expire(self, campaign: Campaign, round_: Round) -> None:
        now = self._clock()
        for device_id in round_.missing():
            gone_since = self._hub.gone_since(device_id)
            if gone_since is not None and now >= gone_since + self._grace_s:
                reason = f"away for more than {self._grace_s:g} s"
                self._record(campaign, round_, DeviceLost(device_id=device_id, reason=reason))
        if round_.deadline is not None and now >= round_.deadline:
            self._record(campaign, round_, DeadlinePassed(stage=round_.stage))

    # --- telling devices ---

    def _push(self, campaign: Campaign, round_: Round) -> None:
        for device_id in round_.order.invited:
            connection = self._hub.connection(device_id)
            if connection is not None:
                self._push_to(campaign, round_, connection)

    def _push_to(self, campaign: Campaign, round_: Round, connection: Connection) -> None:
        """Send a device's instruction, once per connection."""
        instruction = round_.instruction(connection.device_id)
        told = (connection, type(instruction))
        if instruction is None or self._told.get(connection.device_id) == told:
            return
        message = wire.instruction_to_wire(round_.order.round_id, instruction)
        if connection.send(message):
            self._told[connection.device_id] = told
            campaign.traffic[round_.order.round_id].sent += message.ByteSize()

    # --- changing state ---

    def _record(self, campaign: Campaign, round_: Round, event: Event) -> None:
        """Apply an event, store it, then let others know."""
        now = self._clock()
        stage = round_.stage
        if not round_.apply(event, now):
            return
        row = journal.encode(round_.order.round_id, event, now)
        if isinstance(event, SumComputed):
            campaign.model_digest = event.model_digest
            self._store.commit_round(
                campaign.campaign_id,
                round_.order.round_id,
                row,
                event.model_digest,
                round_.survivors,
            )
        else:
            self._store.append_event(round_.order.round_id, row)
        if round_.stage is not stage:
            _log.info(
                "round %d of campaign %s: %s -> %s",
                round_.order.number,
                campaign.campaign_id,
                stage.name,
                round_.stage.name,
            )
        self.changed.fire()

    def _close_round(self, campaign: Campaign, round_: Round) -> None:
        """Tell how a round ended and drop what only it needed."""
        if not round_.stage.ended:
            reason = RoundFailed(reason=campaign.reason or "the campaign ended")
            self._record(campaign, round_, reason)
        self._push(campaign, round_)
        self._told.clear()
        traffic = campaign.traffic[round_.order.round_id]
        self._store.close_round(round_.order.round_id, traffic.received, traffic.sent)
        for update in round_.updates.values():
            self._blobs.delete(update.digest)
        self._metrics.observe_round(round_, traffic.received, traffic.sent)
        self.changed.fire()

    def _end(self, campaign: Campaign, state: int, reason: str) -> None:
        campaign.state, campaign.reason = state, reason
        self._store.end_campaign(campaign.campaign_id, state, reason)
        _log.info("campaign %s ended: %s", campaign.campaign_id, reason or "all rounds committed")
        self.changed.fire()

    # --- reading state ---

    def _load(self, row: CampaignRow) -> Campaign:
        plan = pb.CampaignPlan.FromString(row.plan)
        campaign = Campaign(
            row.campaign_id, row.started_at, plan, row.state, row.model_digest, row.reason
        )
        for round_row in self._store.rounds(row.campaign_id):
            events = self._store.events(round_row.round_id)
            order = journal.order_of(round_row, plan.min_cohort, _timeouts(plan))
            campaign.rounds.append(journal.replay(order, round_row.started_at, events))
            campaign.traffic[round_row.round_id] = Traffic(
                round_row.bytes_received, round_row.bytes_sent
            )
        return campaign

    def _running(self) -> Campaign | None:
        return next((c for c in self._campaigns.values() if c.state == _RUNNING), None)

    def _open(self, round_id: str) -> tuple[Campaign, Round]:
        campaign = self._running()
        round_ = campaign.open_round if campaign else None
        if campaign is None or round_ is None or round_.order.round_id != round_id:
            raise PeerError(f"round {round_id!r} is not open")
        return campaign, round_

    def _round_plan(
        self, plan: pb.CampaignPlan, round_id: str, model_digest: bytes, cohort: int
    ) -> RoundPlan:
        try:
            layout = Layout.of(from_bytes(self._blobs.read(model_digest)))
            return wire.round_plan(
                plan,
                round_id=round_id,
                model_digest=model_digest,
                num_values=layout.num_values,
                cohort=cohort,
            )
        except (ValueError, FederationError) as error:
            raise CampaignError(f"the campaign cannot work: {error}") from error


def _require_possible(plan: pb.CampaignPlan) -> None:
    """Refuse numbers that no round could be made of; `derive_plan` looks at the others."""
    positive = (
        "num_rounds",
        "server_learning_rate",
        "invite_timeout_s",
        "stage_timeout_s",
        "training_timeout_s",
    )
    for name in positive:
        if not getattr(plan, name) > 0:
            raise CampaignError(f"{name} is {getattr(plan, name)}; it must be positive")
    if plan.min_cohort > plan.cohort:
        raise CampaignError(f"min_cohort {plan.min_cohort} is above cohort {plan.cohort}")


def _timeouts(plan: pb.CampaignPlan) -> Timeouts:
    return Timeouts(
        keys_s=plan.invite_timeout_s,
        stage_s=plan.stage_timeout_s,
        updates_s=plan.training_timeout_s,
    )
