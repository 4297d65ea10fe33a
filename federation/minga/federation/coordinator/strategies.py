"""Flower strategies at work in campaigns: what is between them and the coordinator's blobs.

All of this takes time and memory, and runs code that the coordinator's operator let in: the caller
keeps it off its event loop. flwr is loaded when the first campaign asks for it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from minga.federation import wire
from minga.federation.aggregation.optimizers import FedAvg
from minga.federation.aggregation.rules import Mean
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.aggregate import StoredUploads
from minga.federation.coordinator.campaign import Campaign
from minga.federation.coordinator.rounds import PlainRound, Round, SecureRound, SumComputed
from minga.federation.coordinator.rounds.machine import NOT_NEEDED
from minga.federation.errors import CampaignError, FederationError, StorageError, StrategyError
from minga.federation.flower.strategy import FlowerStrategy, Instructions, Result
from minga.federation.parameters import Parameters, from_bytes, to_bytes
from minga.federation.plain import VALUE
from minga.federation.secagg.errors import QuorumError
from minga.federation.secagg.masking import ApplyMasks, apply_masks_threaded
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Training, Work

Rejected = tuple[tuple[str, str], ...]
"""Devices whose updates are unusable, each with the reason."""


class Strategies:
    """The strategy of the campaign that runs, if it has one.

    Args:
        blobs: has models, updates and what strategies keep.
        allowed: the strategies that the coordinator's operator lets in beside Flower's own.
        apply_masks: takes the masks off a sum.
    """

    def __init__(
        self,
        blobs: BlobStore,
        allowed: Sequence[str],
        apply_masks: ApplyMasks = apply_masks_threaded,
    ) -> None:
        self._blobs = blobs
        self._allowed = allowed
        self._apply_masks = apply_masks
        self._at_work: tuple[str, FlowerStrategy] | None = None

    def require_possible(self, plan: pb.CampaignPlan) -> None:
        """Refuse a campaign whose strategy is not allowed here or cannot serve it.

        Raises:
            CampaignError: with the reason.
        """
        try:
            name = wire.strategy_from_wire(plan)
            if name is None:
                return
            optimizer = wire.optimizer_from_wire(plan)
            if optimizer != FedAvg(learning_rate=1.0):
                raise StrategyError("it takes the server optimiser's place; choose one of both")
            if plan.scaffold or plan.HasField("buffer"):
                raise StrategyError("it takes whole rounds; leave scaffold and buffer out")
            if wire.rule_from_wire(plan) != Mean() or plan.HasField("privacy"):
                raise StrategyError("it takes the place of rule and privacy; choose one")
            is_plain = wire.is_plain(plan)
            FlowerStrategy(name, self._allowed).require_possible(
                self._read(plan.model_digest),
                wire.config_from_wire(plan.training),
                num_results=plan.cohort if is_plain else wire.num_groups(plan),
                sums=not is_plain,
            )
        except (FederationError, ValueError) as error:
            raise CampaignError(f"the campaign's Flower strategy cannot work: {error}") from error

    def configure(self, campaign: Campaign, devices: Sequence[str], work: Work) -> Instructions:
        """Ask what the next round's devices are to do; without a strategy what the plan says.

        Raises:
            StrategyError: the strategy fails, or chooses too few devices.
            StorageError: the disk fails.
        """
        training = wire.config_from_wire(campaign.plan.training)
        strategy = self._of(campaign)
        if strategy is None or not isinstance(work, Training):
            return Instructions(training=training, devices=tuple(devices))
        with _disk():
            model, state = self._read(campaign.model_digest), self._state(campaign)
        instructions = strategy.configure(
            number=campaign.num_committed + 1,
            state=state,
            model=model,
            config=training,
            devices=devices,
        )
        if len(instructions.devices) < campaign.plan.min_cohort:
            raise StrategyError(
                f"the strategy chose {len(instructions.devices)} of {len(devices)} devices, a "
                f"round needs {campaign.plan.min_cohort}; choose by cohort instead of by fraction"
            )
        return instructions

    def aggregate(self, campaign: Campaign, round_: Round) -> SumComputed | None:
        """Let the strategy make the next model; None if the campaign has none.

        Raises:
            StrategyError: it fails.
            QuorumError: too few updates are usable.
            FederationError: a secret cannot be rebuilt, or an upload is gone.
            StorageError: the disk fails.
        """
        strategy = self._of(campaign)
        if strategy is None or not isinstance(round_.order.work, Training):
            return None
        order = round_.order
        with _disk():
            uploads = StoredUploads(self._blobs, self._apply_masks)
            results, rejected = _results(round_, uploads)
            model, state = self._read(order.model_digest), self._state(campaign)
        absent = {
            name: reason
            for name, reason in round_.lost.items()
            if name not in round_.updates and reason != NOT_NEEDED
        }
        step = strategy.aggregate(
            number=order.number,
            state=state,
            model=model,
            config=wire.config_from_wire(campaign.plan.training),
            devices=order.invited,
            results=results,
            failures={**absent, **dict(rejected)},
        )
        with _disk():
            return SumComputed(
                model_digest=self._blobs.put_bytes(to_bytes(step.parameters)),
                total_weight=sum(result.num_examples for result in results),
                optimizer_digest=self._blobs.put_bytes(step.state),
                rejected=rejected,
                liars=tuple(sorted(uploads.liars)),
            )

    def _of(self, campaign: Campaign) -> FlowerStrategy | None:
        """Give a campaign's strategy: the same object as long as this process lives."""
        name = wire.strategy_from_wire(campaign.plan)
        if name is None:
            return None
        if self._at_work is None or self._at_work[0] != campaign.campaign_id:
            self._at_work = (campaign.campaign_id, FlowerStrategy(name, self._allowed))
        return self._at_work[1]

    def _state(self, campaign: Campaign) -> bytes:
        digest = campaign.optimizer_digest
        return self._blobs.path(digest).read_bytes() if digest else b""

    def _read(self, digest: bytes) -> Parameters:
        return from_bytes(self._blobs.path(digest).read_bytes())


@contextmanager
def _disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"the coordinator's disk fails ({error}); free space on it") from error


def _results(round_: Round, uploads: StoredUploads) -> tuple[list[Result], Rejected]:
    """Give each update of a plain round, or each group's mean of a secure one."""
    match round_:
        case SecureRound():
            sums = [uploads.unmasked_sum(round_, group) for group in round_.groups]
            return [
                Result(name=f"group-{n}", update=s.mean_delta, num_examples=s.total_weight)
                for n, s in enumerate(sums, 1)
            ], ()
        case PlainRound():
            return _plain_results(round_, uploads.blobs)
        case _:
            raise AssertionError(f"{type(round_).__name__} has no results")


def _plain_results(round_: PlainRound, blobs: BlobStore) -> tuple[list[Result], Rejected]:
    """Read the updates; those that hold NaN or infinity are left out, and their devices named."""
    results: list[Result] = []
    rejected: list[tuple[str, str]] = []
    for name in round_.survivors:
        upload = round_.updates[name]
        update = np.fromfile(blobs.path(upload.digest), VALUE)
        if np.isfinite(update).all():
            results.append(Result(name=name, update=update, num_examples=upload.num_examples))
        else:
            rejected.append((name, "its update holds NaN or infinity"))
    if len(results) < round_.order.min_cohort:
        raise QuorumError(
            f"{len(rejected)} of {len(round_.updates)} updates hold NaN or infinity; "
            f"{round_.order.min_cohort} good ones are needed"
        )
    return results, tuple(rejected)
