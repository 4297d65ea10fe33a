"""Drives campaigns: the shell around `rounds.Round` that owns store, blobs, clock and pushes.

One campaign runs at a time. All of this lives in one event loop. A state change is stored first,
applied second and told third, so a coordinator that is killed at any point goes on where it was:
it reads its campaign, replays the open round's events and gives every device the instruction that
follows from the state. What could not be stored has not happened, and is tried again.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress

from minga.federation import wire
from minga.federation.blobs import BlobStore
from minga.federation.coordinator import campaign_audit, journal
from minga.federation.coordinator.aggregate import Recipe, StoredUploads, aggregate, first_model
from minga.federation.coordinator.audit_log import AuditLog
from minga.federation.coordinator.campaign import RUNNING, Campaign, model_layout, require_possible
from minga.federation.coordinator.herald import Herald
from minga.federation.coordinator.hub import Hub, Signal, wait_for_any
from minga.federation.coordinator.metrics import Metrics
from minga.federation.coordinator.privacy_account import PrivacyAccount
from minga.federation.coordinator.proofs import check_proof
from minga.federation.coordinator.rounds import (
    BufferedRound,
    DeadlinePassed,
    DeviceEvent,
    DeviceLost,
    Event,
    Round,
    RoundFailed,
    Stage,
    SumComputed,
    open_round,
)
from minga.federation.coordinator.selection import muster, trainable
from minga.federation.coordinator.store import CampaignRow, RoundRow, Store
from minga.federation.coordinator.strategies import Strategies
from minga.federation.errors import CampaignError, PeerError, StorageError
from minga.federation.limits import (
    CONDITION_CHECK_S,
    MAX_CONSECUTIVE_ABORTS,
    STATUS_DETAIL_BYTES,
    STORAGE_RETRY_S,
    WATCH_DETAIL_BYTES,
    WATCH_PAUSE_S,
)
from minga.federation.plain import PlainPlan
from minga.federation.secagg.masking import ApplyMasks, apply_masks_threaded
from minga.federation.secagg.signing import Verifier
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Work

_log = logging.getLogger(__name__)


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
        audit: AuditLog,
        reconnect_grace_s: float,
        strategies: Sequence[str] = (),
        apply_masks: ApplyMasks = apply_masks_threaded,
    ) -> None:
        self.changed, self._moved = Signal(), Signal()  # any change; one that the loop acts upon
        self._store = store
        self._blobs = blobs
        self._hub = hub
        self._verifier = verifier
        self._clock = clock
        self._metrics = metrics
        self._audit = audit
        self._grace_s = reconnect_grace_s
        self._apply_masks = apply_masks
        self._started_at = clock()
        self._herald = Herald(hub, store.sync)
        self.strategies = Strategies(blobs, strategies, apply_masks)
        self._account = PrivacyAccount(store)
        # Device -> the upload of the open round, also one that is never announced.
        self._uploads: dict[str, bytes] = {}
        self._campaigns = {row.campaign_id: Campaign.load(store, row) for row in store.campaigns()}

    # --- for operators ---

    def describe(self) -> list[pb.Campaign]:
        """Give all campaigns, oldest first, in as much detail as fits into a message."""
        described: list[pb.Campaign] = []
        detail_bytes = STATUS_DETAIL_BYTES
        for campaign in reversed(self._campaigns.values()):
            described.append(campaign.describe(detail_bytes))
            detail_bytes -= described[-1].ByteSize()
        return described[::-1]

    def start(self, plan: pb.CampaignPlan, by: str) -> Campaign:
        """Store a new campaign; the loop takes it up at once.

        Args:
            plan: What it does.
            by: Who starts it, for the audit log.

        Raises:
            CampaignError: another one is running, or the plan cannot work.
            BudgetError: its rounds would spend more privacy than is left.
        """
        running = self._running()
        if running is not None:
            raise CampaignError(
                f"campaign {running.campaign_id} is running; wait for it or cancel it first"
            )
        require_possible(plan, model_layout(self._blobs, plan, plan.model_digest))
        self._account.require_left(plan, plan.num_rounds)
        campaign = Campaign(
            campaign_id=secrets.token_hex(6), plan=plan, model_digest=first_model(plan, self._blobs)
        )
        row = CampaignRow(
            campaign_id=campaign.campaign_id,
            started_at=self._clock(),
            plan=plan.SerializeToString(),
            state=RUNNING,
            reason="",
            model_digest=campaign.model_digest,
        )
        with self._store.transaction():
            self._store.add_campaign(row)
            campaign_audit.campaign_started(self._audit, campaign, by)
        self._campaigns[campaign.campaign_id] = campaign
        self._fire()
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

    def cancel(self, campaign_id: str, by: str) -> None:
        """End a campaign now, as `by` wishes; what was committed stays."""
        campaign = self.get(campaign_id)
        if campaign.is_running:
            self._end(campaign, pb.CAMPAIGN_STATE_CANCELLED, "cancelled by an operator", by)

    async def watch(self, campaign_id: str) -> AsyncIterator[pb.Campaign]:
        """Give the campaign now and after each change, until it has ended."""
        campaign = self.get(campaign_id)
        while not campaign.is_over:
            change = self.changed.next()
            yield campaign.describe(WATCH_DETAIL_BYTES)
            await asyncio.sleep(WATCH_PAUSE_S * campaign.num_wanted)
            await change.wait()
        yield campaign.describe()

    # --- for devices ---

    def take(self, event: DeviceEvent, round_id: str, size: int) -> None:
        """Take a device's answer.

        Args:
            event: the answer.
            round_id: the round that it names.
            size: bytes that it took on the wire, for the record.

        Raises:
            PeerError: it is refused; nothing changed.
            StorageError: it could not be stored; nothing changed.
        """
        campaign = self._running()
        round_ = campaign.open_round if campaign else None
        if campaign is not None and self._is_early(campaign, event.device_id, round_id):
            self._herald.ask_again(event.device_id)
            return
        if campaign is None or round_ is None or round_.round_id_of(event.device_id) != round_id:
            raise PeerError(f"round {round_id!r} is not open")
        check_proof(round_, event, self._verifier, self._blobs)
        campaign.bytes_received += size
        self._record(campaign, round_, event)

    def _is_early(self, campaign: Campaign, device_id: str, round_id: str) -> bool:
        """True if a device that goes on into the next round answers before that is open."""
        round_ = campaign.open_round
        if isinstance(round_, BufferedRound):
            return device_id in round_.carried and round_.round_id_of(device_id) == round_id
        base = campaign.carried().get(device_id)
        return base is not None and base.round_id == round_id

    def lose(self, device_id: str, reason: str) -> None:
        """Take a device out of the open round, if it is in it."""
        campaign = self._running()
        if campaign is not None and campaign.open_round is not None:
            event = DeviceLost(device_id=device_id, reason=reason)
            self._record(campaign, campaign.open_round, event)

    def count_transfer(self, device_id: str, *, received: int = 0, sent: int = 0) -> None:
        """Add a device's blob bytes to the record of the round that it is in."""
        campaign = self._running()
        round_ = campaign.open_round if campaign else None
        if campaign is not None and round_ is not None and device_id in round_.order.invited:
            campaign.bytes_received += received
            campaign.bytes_sent += sent

    def greeting(self, device_id: str, round_id: str) -> list[pb.SessionResponse]:
        """Say how the round ended that a device comes back with; the loop does the rest."""
        if not round_id:
            return []
        running = self._running()
        if running is not None:
            round_ = running.open_round
            if round_ is not None and round_.round_id_of(device_id) == round_id:
                return []
            if self._is_early(running, device_id, round_id):
                return []
        for campaign in self._campaigns.values():
            verdict = campaign.verdict(device_id, round_id)
            if verdict is not None:
                return [wire.round_end(verdict, device_id, round_id)]
        record = self._store.record(round_id)
        if record is None:
            return [wire.unknown_round(round_id)]
        return [wire.round_end(pb.Round.FromString(record), device_id, round_id)]

    def expects_upload(self, device_id: str, digest: bytes, size: int) -> bool:
        """True if the open round waits for this masked update from a device.

        A device has one upload per round: the first digest that it comes with.
        """
        campaign = self._running()
        round_ = campaign.open_round if campaign else None
        if campaign is not None and device_id in campaign.carried():
            expected = PlainPlan.upload_size_of(
                model_layout(self._blobs, campaign.plan, campaign.model_digest).num_values
            )
        elif round_ is not None and round_.awaits_update(device_id):
            expected = round_.order.plan.upload_size
        else:
            return False
        return size == expected and self._uploads.setdefault(device_id, digest) == digest

    def blobs_in_use(self) -> set[bytes]:
        """Give the digests of all that campaigns started from, came to, go on with or wait for."""
        kept = set[bytes]()
        for campaign in self._campaigns.values():
            kept |= {campaign.plan.model_digest, campaign.model_digest}
            if campaign.is_running:
                kept |= {campaign.optimizer_digest} - {b""}
                kept |= {base.model_digest for base in campaign.bases()}
            if campaign.open_round is not None:
                kept |= {update.digest for update in campaign.open_round.updates.values()}
        return kept

    def needs_blob(self, digest: bytes) -> bool:
        """True if a device may fetch this blob: it is the model of a running campaign."""
        campaign = self._running()
        return campaign is not None and (
            digest == campaign.model_digest
            or any(digest == base.model_digest for base in campaign.bases())
        )

    # --- the loop ---

    async def run(self) -> None:
        """Run campaigns, one after the other, for ever."""
        while True:
            change = self.changed.next()
            campaign = next((c for c in self._campaigns.values() if not c.is_over), None)
            if campaign is None:
                await change.wait()
                continue
            try:
                await self._account.prepare(campaign.plan)
                while not campaign.is_over:
                    await self._step(campaign)
            except Exception as error:  # noqa: BLE001 - no campaign may end the ones to come
                self._stumble(campaign, error)
                await wait_for_any([self.changed.next()], STORAGE_RETRY_S)

    def _stumble(self, campaign: Campaign, error: Exception) -> None:
        """Keep a campaign that the disk stopped, to be tried again; any other error ends it."""
        if not isinstance(error, StorageError):
            _log.error("campaign %s failed", campaign.campaign_id, exc_info=error)
            with suppress(Exception):  # it fails again in a while, and is ended then
                self._end(campaign, pb.CAMPAIGN_STATE_FAILED, str(error) or type(error).__name__)
                return
        _log.error("campaign %s stands still: %s", campaign.campaign_id, error)
        campaign.reason = str(error)
        self._fire()

    async def _step(self, campaign: Campaign) -> None:
        if campaign.open_round is not None:
            await self._run_round(campaign, campaign.open_round)
        elif (work := campaign.next_work()) is None:
            self._end(campaign, pb.CAMPAIGN_STATE_COMPLETED, "")
        elif campaign.num_aborts_in_a_row >= MAX_CONSECUTIVE_ABORTS:
            reason = f"{MAX_CONSECUTIVE_ABORTS} rounds in a row failed: "
            reason += campaign.records[-1].reason
            self._end(campaign, pb.CAMPAIGN_STATE_FAILED, reason)
        else:
            await self._begin_round(campaign, work)

    async def _begin_round(self, campaign: Campaign, work: Work) -> None:
        self._account.require_left(campaign.plan)
        devices = await self._gather(campaign, work)
        if not devices:
            return
        told = await asyncio.to_thread(self.strategies.configure, campaign, devices, work)
        if not campaign.is_running:  # it may have been cancelled meanwhile
            return
        order = campaign.next_order(
            told.devices,
            model_layout(self._blobs, campaign.plan, campaign.model_digest).num_values,
            told.training,
            work=work,
            population=trainable(self._store, campaign.plan),
        )
        now = self._clock()
        self._store.add_round(
            RoundRow(
                round_id=order.round_id,
                campaign_id=campaign.campaign_id,
                number=order.number,
                started_at=now,
                invited=order.invited,
                invite=wire.invite_to_wire(order).SerializeToString(),
            )
        )
        campaign.open_round = open_round(order, now)
        self._fire()

    async def _gather(self, campaign: Campaign, work: Work) -> Sequence[str]:
        """Wait for the cohort, or after the invitation's time for the minimum, and draw it."""
        waited_until = self._clock() + campaign.plan.invite_timeout_s
        while campaign.is_running:
            changes = self._changes()
            left_s = waited_until - self._clock()
            found = muster(self._hub, campaign, work, is_late=left_s <= 0)
            if found.is_enough:
                campaign.reason = ""
                return found.draw()
            if found.reason != campaign.reason:
                campaign.reason = found.reason
                self._fire()
                continue
            limits_s = [left_s] * (left_s > 0) + [CONDITION_CHECK_S] * (found.num_unfit > 0)
            await wait_for_any(changes, min(limits_s, default=None))
        return ()

    async def _run_round(self, campaign: Campaign, round_: Round) -> None:
        while not round_.stage.ended and campaign.is_running:
            changes = self._changes()
            campaign.bytes_sent += self._herald.tell(round_)
            if round_.stage is Stage.AGGREGATE:
                await self._aggregate(campaign, round_)
            else:
                await wait_for_any(changes, self._time_left(round_))
                self._expire(campaign, round_)
        self._close_round(campaign, round_)

    async def _aggregate(self, campaign: Campaign, round_: Round) -> None:
        """Unmask the sum off the loop, then commit."""
        event: Event
        try:
            self._account.charge(campaign.plan, round_)
            event = await asyncio.to_thread(self._next_model, campaign, round_)
        except StorageError:
            raise  # everything it is made from is kept, so it can be done again
        except Exception as error:  # noqa: BLE001 - the round failed, the coordinator lives on
            _log.exception("round %s: the sum failed", round_.order.round_id)
            event = RoundFailed(reason=f"the sum failed: {error}")
        if campaign.is_running:  # it may have been cancelled meanwhile
            former = campaign.optimizer_digest
            self._record(campaign, round_, event)
            self._drop_unused({former})

    def _next_model(self, campaign: Campaign, round_: Round) -> SumComputed:
        by_strategy = self.strategies.aggregate(campaign, round_)
        if by_strategy is not None:
            return by_strategy
        uploads = StoredUploads(self._blobs, self._apply_masks)
        return aggregate(round_, uploads, Recipe.of(campaign.plan), campaign.optimizer_digest)

    def _time_left(self, round_: Round) -> float | None:
        """Seconds until the stage's deadline, or until an absent device counts as lost."""
        deadline = round_.deadline(self._started_at)
        alarms = [] if deadline is None else [deadline]
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
        deadline = round_.deadline(self._started_at)
        if deadline is not None and now >= deadline:
            self._record(campaign, round_, DeadlinePassed(stage=round_.stage))

    # --- changing state ---

    def _record(self, campaign: Campaign, round_: Round, event: Event) -> None:
        """Store an event, apply it, then wake who tells others.

        Raises:
            PeerError: it contradicts the state.
            StorageError: it cannot be stored.
        """
        if not round_.changed_by(event):
            return
        now, stage = self._clock(), round_.stage
        row = journal.encode(round_.order.round_id, event, now)
        if isinstance(event, SumComputed):
            self._store.commit_round(
                campaign.campaign_id,
                round_.order.round_id,
                row,
                model_digest=event.model_digest,
                optimizer_digest=event.optimizer_digest,
                counted=round_.counted_with(event),
            )
            campaign.model_digest = event.model_digest
            campaign.optimizer_digest = event.optimizer_digest
        else:
            self._store.append_event(round_.order.round_id, row)
        round_.apply(event, now)
        campaign.reason = ""
        if round_.stage is not stage:
            name, number = campaign.campaign_id, round_.order.number
            _log.info("round %d of %s: %s -> %s", number, name, stage.name, round_.stage.name)
        self.changed.fire()
        if round_.stage is not stage or isinstance(event, DeviceLost):
            self._moved.fire()  # one more answer of those that are awaited is nothing to do

    def _close_round(self, campaign: Campaign, round_: Round) -> None:
        """Tell how a round ended and drop what only it needed."""
        if not round_.stage.ended:
            reason = campaign.reason or "the campaign ended"
            self._record(campaign, round_, RoundFailed(reason=reason))
        campaign.bytes_sent += self._herald.tell(round_)
        record = campaign.record()
        self._account.note(campaign.plan, round_, record)
        with self._store.transaction():
            self._store.close_round(round_.order.round_id, record.SerializeToString())
            campaign_audit.round_ended(self._audit, campaign, record, round_.result)
        campaign.close_round(record)
        updates = {update.digest for update in round_.updates.values()}
        going = campaign.carried()
        given_up = {digest for name, digest in self._uploads.items() if name not in going}
        self._drop_unused({*updates, *given_up, round_.order.model_digest})
        self._herald.forget(but=going)
        self._uploads = {name: d for name, d in self._uploads.items() if name in going}
        self._metrics.observe_round(record, campaign.plan)
        self._fire()

    def _end(self, campaign: Campaign, state: int, reason: str, by: str = "") -> None:
        with self._store.transaction():
            self._store.end_campaign(campaign.campaign_id, state, reason)
            campaign_audit.campaign_ended(self._audit, campaign, state, reason, by)
        campaign.state, campaign.reason = state, reason
        _log.info("campaign %s ended: %s", campaign.campaign_id, reason or "all rounds committed")
        self._drop_unused({campaign.optimizer_digest})
        self._fire()

    def _drop_unused(self, digests: set[bytes]) -> None:
        """Delete what no campaign needs any more; what stays nevertheless is collected later."""
        for digest in digests - self.blobs_in_use() - {b""}:
            try:
                self._blobs.delete(digest)
            except OSError:
                _log.exception("blob %s could not be deleted", digest.hex())

    # --- reading state ---

    def _changes(self) -> list[asyncio.Event]:
        """Give what happens next: to a campaign, or to the list of connected devices."""
        return [self._moved.next(), self._hub.changed.next()]

    def _fire(self) -> None:
        self.changed.fire()
        self._moved.fire()

    def _running(self) -> Campaign | None:
        return next((c for c in self._campaigns.values() if c.is_running), None)
