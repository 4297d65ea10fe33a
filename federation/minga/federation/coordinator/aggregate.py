"""From a round's updates to the next global model.

`take_step` is all of the arithmetic and knows no disk: where updates are is for `Uploads` to say,
so that a simulation of devices uses the same. `aggregate` is it for a coordinator, whose updates
and models are blobs.
"""

import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from minga.federation import wire
from minga.federation.aggregation.combination import Combined, combine
from minga.federation.aggregation.contributions import (
    Contribution,
    FileContribution,
    VectorContribution,
)
from minga.federation.aggregation.noise import RandomBytes, add_gaussian
from minga.federation.aggregation.optimizers import (
    ServerOptimizer,
    Vector,
    advance,
    initial_state,
)
from minga.federation.aggregation.privacy import Privacy, central_std, longest_levels
from minga.federation.aggregation.rules import Clip, Mean, Rule
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.rounds import (
    PlainRound,
    Round,
    SecureRound,
    SumComputed,
)
from minga.federation.errors import StorageError
from minga.federation.parameters import (
    ParameterFile,
    from_bytes,
    read_parameters,
    to_bytes,
    to_pieces,
)
from minga.federation.parts import CONTROL, with_control
from minga.federation.plain import VALUE, PlainPlan
from minga.federation.secagg.coordinator import MaskedSum, Unmasked, unmask
from minga.federation.secagg.errors import QuorumError
from minga.federation.secagg.masking import ApplyMasks, apply_masks_threaded
from minga.federation.secagg.plan import RoundPlan
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Evaluation, Training

_log = logging.getLogger(__name__)

_WITHIN: Final = 1.0 - 2.0**-19
"""An update that its device had to shorten is as long as the bound, to float32's rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a campaign makes of a round's updates."""

    rule: Rule
    """How one mean is made of several updates, or of several groups' sums."""
    optimizer: ServerOptimizer
    """Which step the model takes."""
    privacy: Privacy | None = None
    """How each device is hidden in the mean, which then takes the rule's place."""

    @classmethod
    def of(cls, plan: pb.CampaignPlan) -> Self:
        """Read what a campaign's plan says.

        Raises:
            ValueError, PeerError: it says nothing that this version can do.
        """
        return cls(
            rule=wire.rule_from_wire(plan),
            optimizer=wire.optimizer_from_wire(plan),
            privacy=wire.privacy_from_wire(plan),
        )


class Uploads(Protocol):
    """The updates of one round, wherever they are."""

    @property
    def liars(self) -> Collection[str]:
        """Devices whose false shares had to be left out so far."""
        ...

    def contributions(self, round_: PlainRound) -> Sequence[Contribution]:
        """Give the updates of a plain round, in the order of its survivors."""
        ...

    def unmasked_sum(self, round_: SecureRound, group: tuple[str, ...]) -> Unmasked:
        """Add one group's updates, none of which is seen.

        Raises:
            FederationError: a secret cannot be rebuilt, or an upload is gone.
        """
        ...


class StoredUploads:
    """Uploads that are blobs: plain ones are read where they lie, masked ones unmasked by group.

    Args:
        blobs: has them.
        apply_masks: takes the masks off a sum.
    """

    def __init__(self, blobs: BlobStore, apply_masks: ApplyMasks = apply_masks_threaded) -> None:
        self.blobs = blobs
        self.liars: set[str] = set()
        """Devices whose false shares had to be left out so far."""
        self._apply_masks = apply_masks

    def contributions(self, round_: PlainRound) -> list[FileContribution]:
        """Give the updates of a plain round where they lie."""
        updates = [round_.updates[name] for name in round_.survivors]
        return [
            FileContribution(
                name=update.device_id,
                path=self.blobs.path(update.digest),
                num_values=update.size // VALUE.itemsize,
                weight=update.num_examples,
                factor=round_.factor_of(update.device_id),
            )
            for update in updates
        ]

    def unmasked_sum(self, round_: SecureRound, group: tuple[str, ...]) -> Unmasked:
        """Add one group's masked updates and unmask their sum.

        Raises:
            FederationError: a secret cannot be rebuilt, or an upload is gone.
        """
        survivors = [name for name in group if name in round_.updates]
        masked = MaskedSum(round_.plan)
        for device_id in survivors:
            masked.add_chunks(self.blobs.chunks(round_.updates[device_id].digest))
        result = unmask(
            plan=round_.plan,
            graph=round_.graph,
            adverts=round_.adverts,
            sharers=[name for name in group if name in round_.shares],
            survivors=survivors,
            reveals=round_.reveals,
            masked_sum=masked,
            apply=self._apply_masks,
        )
        if result.liars:
            _log.warning("round %s: false shares from %s", round_.order.round_id, result.liars)
            self.liars.update(result.liars)
        return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The step that a round's updates came to."""

    values: Vector
    """The next model, tensor behind tensor."""
    total_weight: int
    rejected: tuple[tuple[str, str], ...]
    """Devices whose updates turned out to be unusable, each with the reason."""
    max_norm: float
    """The bound on updates' lengths with which a private campaign goes on; 0: it has none."""


def take_step(
    round_: Round,
    uploads: Uploads,
    recipe: Recipe,
    *,
    model: Iterable[tuple[str, NDArray[np.float32]]],
    state: Mapping[str, Vector],
    random_bytes: RandomBytes = os.urandom,
) -> Taken:
    """Make one mean of a round's updates, and let the server optimiser take its step.

    Memory is one vector as long as the model, a second one while masks are taken off, the state
    and the rule's blocks.

    Args:
        round_: the round, with all that its devices sent.
        uploads: what they sent.
        recipe: what is made of it.
        model: the tensors that the round started from, or blocks of them, in the order of their
            layout, each with its tensor's name.
        state: what the optimiser kept, each vector as long as the model; becomes its next state.
        random_bytes: source of the noise, for private campaigns.

    Raises:
        FederationError: see `aggregate`.
    """
    max_norm = 0.0
    if recipe.privacy is None:
        values, combined = _mean(round_, uploads, recipe.rule)
    else:
        values, combined, max_norm = _private_mean(round_, uploads, recipe.privacy, random_bytes)
    start = 0
    for name, tensor in model:
        part = slice(start, start + tensor.size)  # the next model grows in the mean's place
        if name.startswith(CONTROL):
            values[part] = tensor.ravel() + values[part] * _share(round_, combined)
        else:
            kept = {key: vector[part] for key, vector in state.items()}
            advance(recipe.optimizer, kept, tensor.ravel(), values[part])
        start += tensor.size
    return Taken(
        values=values,
        total_weight=combined.total_weight,
        rejected=tuple(combined.rejected.items()),
        max_norm=max_norm,
    )


def aggregate(
    round_: Round,
    uploads: StoredUploads,
    recipe: Recipe,
    optimizer_digest: bytes,
) -> SumComputed:
    """Make one mean of a round's updates, and let the server optimiser take its step.

    The mean of an evaluation, or of answers to a question, is the result; no model changes.

    Memory is one vector as long as the model, a second one while masks are taken off, what the
    optimiser keeps and the rule's blocks, whatever the cohort: uploads and the model are read in
    blocks, and the next model grows in the mean's place and is written from there.
    Doing it again gives the same bytes, but for noise, so a crash in the middle costs time only.

    Args:
        round_: the round, with all that its devices sent.
        uploads: what they sent; where that lies are the model and what the optimiser kept, and goes
            what comes of them.
        recipe: what is made of the updates.
        optimizer_digest: what the optimiser kept in the round before; empty in the first one.

    Raises:
        FederationError: a secret cannot be rebuilt, or an upload is gone.
        QuorumError: too few updates are usable.
        RuleError: too few for the rule.
        StepError: the next model would not be finite.
        StorageError: the disk fails.
    """
    try:
        if not isinstance(round_.order.work, Training):
            return measured(round_, uploads, optimizer_digest)
        blobs = uploads.blobs
        model = ParameterFile.open(blobs.path(round_.order.model_digest))
        state = _state(recipe.optimizer, blobs, optimizer_digest, model.layout.num_values)
        taken = take_step(
            round_,
            uploads,
            recipe,
            model=model.blocks(),
            state=state,
        )
        return SumComputed(
            model_digest=blobs.put_bytes(*to_pieces(model.layout.unflatten(taken.values))),
            total_weight=taken.total_weight,
            optimizer_digest=blobs.put_bytes(*to_pieces(state)) if state else b"",
            rejected=taken.rejected,
            liars=tuple(sorted(uploads.liars)),
            max_norm=taken.max_norm,
        )
    except OSError as error:
        raise StorageError(f"the coordinator's disk fails ({error}); free space on it") from error


def first_model(plan: pb.CampaignPlan, blobs: BlobStore) -> bytes:
    """Give the digest of what travels first: the campaign's model, with its control variate."""
    if not plan.scaffold:
        return plan.model_digest
    model = from_bytes(blobs.read(plan.model_digest))
    return blobs.put_bytes(to_bytes(with_control(model)))


def measured(round_: Round, uploads: Uploads, optimizer_digest: bytes) -> SumComputed:
    """Give the weighted mean of what devices measured, or answered, in the place of a model."""
    values, combined = _mean(round_, uploads, Mean())
    rejected, total_weight = tuple(combined.rejected.items()), combined.total_weight
    work, liars = round_.order.work, tuple(sorted(uploads.liars))
    if isinstance(work, Evaluation):
        return SumComputed(
            model_digest=round_.order.model_digest,
            total_weight=total_weight,
            optimizer_digest=optimizer_digest,
            rejected=rejected,
            metrics=tuple(sorted(work.metrics_of(values).items())),
            liars=liars,
        )
    answer = tuple(float(value) for value in values)
    return SumComputed(
        model_digest=b"",
        total_weight=total_weight,
        rejected=rejected,
        answer=answer,
        liars=liars,
    )


def _share(round_: Round, combined: Combined) -> np.float32:
    """Say how far a mean change moves the global control variate: |S| / N in the algorithm.

    Karimireddy et al., "SCAFFOLD", ICML 2020, algorithm 1, line 17.
    """
    counted = len(round_.survivors) - len(combined.rejected)
    return np.float32(counted / max(counted, round_.order.population))


def _state(
    optimizer: ServerOptimizer, blobs: BlobStore, digest: bytes, num_values: int
) -> dict[str, Vector]:
    """Read what the optimiser kept, each vector as long as the model."""
    if not digest:
        return initial_state(optimizer, num_values)
    return read_parameters(blobs.path(digest))


def _private_mean(
    round_: Round, uploads: Uploads, privacy: Privacy, random_bytes: RandomBytes
) -> tuple[Vector, Combined, float]:
    """Make a mean that each device changes by a bounded length, and add noise unless devices did.

    In plain rounds a device that did not keep to the length is cut here; in secure ones that is the
    devices' own doing, each of which protects itself by it.

    Returns:
        The mean, who is in it, and the bound with which the campaign goes on.
    """
    encoding = round_.order.encoding
    assert encoding is not None
    max_norm, share = encoding.max_norm, 0.0
    match round_.order.plan:
        case PlainPlan():
            rule, longest = Mean(is_weighted=False, clip=Clip(max_norm=max_norm)), max_norm
            values, combined = _mean(round_, uploads, rule)
            within = [length < max_norm * _WITHIN for length in combined.lengths]
            share = sum(within) / len(within)
        case RoundPlan() as plan:
            longest = longest_levels(plan, encoding) * plan.clip / plan.max_level
            values, combined = _mean(round_, uploads, Mean(is_weighted=False))
            if encoding.num_bits:
                share = encoding.share_within(plan, float(values[-1]))
                values = values[: -encoding.num_bits]
    noise_multiplier = privacy.noise_multiplier
    if privacy.clip is not None:
        if not privacy.is_distributed:
            noise_multiplier = privacy.clip.update_noise(noise_multiplier, combined.total_weight)
            share = privacy.clip.blur(share, random_bytes)
        max_norm = privacy.clip.next_norm(max_norm, share)
    if not privacy.is_distributed:
        std = central_std(
            noise_multiplier=noise_multiplier,
            max_norm=longest,
            num_devices=combined.total_weight,
        )
        add_gaussian(values, std, random_bytes)
    return values, combined, max_norm


def _mean(round_: Round, uploads: Uploads, rule: Rule) -> tuple[Vector, Combined]:
    """Make one mean update of a round's updates, or of its groups' sums."""
    match round_:
        case SecureRound():
            return _secure_mean(round_, uploads, rule)
        case PlainRound():
            return _plain_mean(round_, uploads, rule)
        case _:
            raise AssertionError(f"{type(round_).__name__} has no mean")


# --- secure rounds ----------------------------------------------------------------------------


def _secure_mean(round_: SecureRound, uploads: Uploads, rule: Rule) -> tuple[Vector, Combined]:
    """Combine the groups' means; while there are several, they wait on the disk."""
    if len(round_.groups) == 1:
        [group] = round_.groups
        result = uploads.unmasked_sum(round_, group)
        values = result.mean_delta  # what comes of it takes its place
        return values, combine(rule, [_contribution(group, values, result)], values)
    values = np.empty(round_.plan.num_values, np.float32)
    with TemporaryDirectory(prefix="minga-sums-") as folder:
        sums: list[VectorContribution] = []
        for group in round_.groups:
            result = uploads.unmasked_sum(round_, group)
            file = Path(folder) / str(len(sums))
            result.mean_delta.tofile(file)
            sums.append(_contribution(group, np.memmap(file, np.float32, "r"), result))
        return values, combine(rule, sums, values)


def _contribution(group: tuple[str, ...], values: Vector, result: Unmasked) -> VectorContribution:
    name = f"the group of {group[0]}"
    return VectorContribution(name=name, values=values, weight=result.total_weight)


# --- plain rounds -----------------------------------------------------------------------------


def _plain_mean(round_: PlainRound, uploads: Uploads, rule: Rule) -> tuple[Vector, Combined]:
    """Combine the updates as they are."""
    values = np.empty(round_.order.plan.num_values, np.float32)
    combined = combine(rule, uploads.contributions(round_), values)
    if len(combined.counted) < round_.order.min_cohort:
        raise QuorumError(
            f"{len(combined.rejected)} of {len(round_.survivors)} updates are unusable "
            f"({'; '.join(sorted(set(combined.rejected.values())))}); "
            f"{round_.order.min_cohort} good ones are needed"
        )
    return values, combined
