"""From updates on the disk to the next global model."""

import logging
from collections.abc import Iterator

import numpy as np

from minga.federation.aggregation.optimizers import (
    ServerOptimizer,
    Vector,
    advance,
    initial_state,
)
from minga.federation.analytics import Question
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.rounds import (
    PlainRound,
    PlainUpdateUploaded,
    Round,
    SecureRound,
    SumComputed,
)
from minga.federation.errors import StorageError
from minga.federation.parameters import from_bytes, read_layout, read_tensors, to_bytes
from minga.federation.parts import CONTROL, with_control
from minga.federation.plain import VALUE
from minga.federation.secagg.coordinator import MaskedSum, Unmasked, unmask
from minga.federation.secagg.errors import QuorumError
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Evaluation

_log = logging.getLogger(__name__)

_BLOCK_VALUES = 1 << 18
"""So many coordinates of plain updates are added at a time."""

Rejected = tuple[tuple[str, str], ...]
"""Devices whose updates are unusable, each with the reason."""


def aggregate(
    round_: Round, blobs: BlobStore, optimizer: ServerOptimizer, optimizer_digest: bytes
) -> SumComputed:
    """Make the mean of a round's updates, and let the server optimiser take its step.

    The mean of an evaluation, or of answers to a question, is the result; no model changes.

    Memory is three times the model and what the optimiser keeps, whatever the cohort: uploads are
    added in pieces as they are read, and the next model takes the mean's place tensor by tensor.
    Doing it again gives the same bytes, so a crash in the middle costs time only.

    Args:
        round_: the round, with all that its devices sent.
        blobs: has the uploads, the model and what the optimiser kept; gets what comes of them.
        optimizer: which step is taken.
        optimizer_digest: what the optimiser kept in the round before; empty in the first one.

    Raises:
        FederationError: a secret cannot be rebuilt, or an upload is gone.
        QuorumError: too few updates are usable.
        StepError: the next model would not be finite.
        StorageError: the disk fails.
    """
    try:
        values, total_weight, rejected = _mean(round_, blobs)
        if isinstance(round_.order.work, Question):
            answer = tuple(float(value) for value in values)
            return SumComputed(
                model_digest=b"", total_weight=total_weight, rejected=rejected, answer=answer
            )
        if isinstance(round_.order.work, Evaluation):
            return SumComputed(
                model_digest=round_.order.model_digest,
                total_weight=total_weight,
                optimizer_digest=optimizer_digest,
                rejected=rejected,
                metrics=tuple(sorted(round_.order.work.metrics_of(values).items())),
            )
        model = blobs.path(round_.order.model_digest)
        state = _state(optimizer, blobs, optimizer_digest, values.size)
        start, names = 0, read_layout(model).names
        for name, tensor in zip(names, read_tensors(model), strict=True):
            part = slice(start, start + tensor.size)  # the next model grows in the mean's place
            if name.startswith(CONTROL):
                values[part] = tensor.ravel() + values[part] * _share(round_, rejected)
            else:
                kept = {key: vector[part] for key, vector in state.items()}
                advance(optimizer, kept, tensor.ravel(), values[part])
            start += tensor.size
        return SumComputed(
            model_digest=blobs.put_bytes(to_bytes(read_layout(model).unflatten(values))),
            total_weight=total_weight,
            optimizer_digest=blobs.put_bytes(to_bytes(state)) if state else b"",
            rejected=rejected,
        )
    except OSError as error:
        raise StorageError(f"the coordinator's disk fails ({error}); free space on it") from error


def first_model(plan: pb.CampaignPlan, blobs: BlobStore) -> bytes:
    """Give the digest of what travels first: the campaign's model, with its control variate."""
    if not plan.scaffold:
        return plan.model_digest
    model = from_bytes(blobs.read(plan.model_digest))
    return blobs.put_bytes(to_bytes(with_control(model)))


def _share(round_: Round, rejected: Rejected) -> np.float32:
    """Say how far a mean change moves the global control variate: |S| / N in the algorithm.

    Karimireddy et al., "SCAFFOLD", ICML 2020, algorithm 1, line 17.
    """
    counted = len(round_.survivors) - len(rejected)
    return np.float32(counted / max(counted, round_.order.population))


def _state(
    optimizer: ServerOptimizer, blobs: BlobStore, digest: bytes, num_values: int
) -> dict[str, Vector]:
    """Read what the optimiser kept, each vector as long as the model."""
    if not digest:
        return initial_state(optimizer, num_values)
    path = blobs.path(digest)
    return dict(zip(read_layout(path).names, read_tensors(path), strict=True))


def _mean(round_: Round, blobs: BlobStore) -> tuple[Vector, int, Rejected]:
    """Give the weighted mean of the updates, the sum of their weights, and which are unusable."""
    match round_:
        case SecureRound():
            return *_secure_mean(round_, blobs), ()
        case PlainRound():
            return _plain_mean(round_, blobs)
        case _:
            raise AssertionError(f"{type(round_).__name__} has no mean")


# --- secure rounds ----------------------------------------------------------------------------


def _secure_mean(round_: SecureRound, blobs: BlobStore) -> tuple[Vector, int]:
    first, *others = round_.groups
    result = unmasked_sum(round_, first, blobs)
    values, total_weight = result.mean_delta, result.total_weight
    for group in others:
        result = unmasked_sum(round_, group, blobs)
        total_weight += result.total_weight
        values += (result.mean_delta - values) * np.float32(result.total_weight / total_weight)
    return values, total_weight


def unmasked_sum(round_: SecureRound, group: tuple[str, ...], blobs: BlobStore) -> Unmasked:
    """Add one group's masked updates and unmask their sum.

    Raises:
        FederationError: a secret cannot be rebuilt, or an upload is gone.
    """
    survivors = [name for name in group if name in round_.updates]
    masked = MaskedSum(round_.plan)
    for device_id in survivors:
        masked.add_chunks(blobs.chunks(round_.updates[device_id].digest))
    result = unmask(
        plan=round_.plan,
        graph=round_.graph,
        adverts=round_.adverts,
        sharers=[name for name in group if name in round_.shares],
        survivors=survivors,
        reveals=round_.reveals,
        masked_sum=masked,
    )
    if result.liars:
        _log.warning("round %s: false shares from %s", round_.order.round_id, result.liars)
    return result


# --- plain rounds -----------------------------------------------------------------------------


def _plain_mean(round_: PlainRound, blobs: BlobStore) -> tuple[Vector, int, Rejected]:
    """Average updates; those that hold NaN or infinity are left out, and their devices named."""
    updates = [round_.updates[name] for name in round_.survivors]
    factors = [round_.factor_of(name) for name in round_.survivors]
    values, total_weight = _weighted_mean(updates, factors, round_.order.plan.num_values, blobs)
    if np.isfinite(values).all():
        return values, total_weight, ()
    good = [update for update in updates if _is_finite(update, blobs)]
    if len(good) < round_.order.min_cohort:
        raise QuorumError(
            f"{len(updates) - len(good)} of {len(updates)} updates hold NaN or infinity; "
            f"{round_.order.min_cohort} good ones are needed"
        )
    factors = [round_.factor_of(update.device_id) for update in good]
    values, total_weight = _weighted_mean(good, factors, values.size, blobs)
    rejected = [
        (update.device_id, "its update holds NaN or infinity")
        for update in updates
        if update not in good
    ]
    return values, total_weight, tuple(rejected)


def _weighted_mean(
    updates: list[PlainUpdateUploaded], factors: list[float], num_values: int, blobs: BlobStore
) -> tuple[Vector, int]:
    total_weight = sum(update.num_examples for update in updates)
    values = np.empty(num_values, np.float32)
    for start, blocks in _blocks(updates, num_values, blobs):
        total = np.zeros(blocks[0].size)
        for update, factor, block in zip(updates, factors, blocks, strict=True):
            total += block * (factor * update.num_examples / total_weight)
        values[start : start + total.size] = total
    return values, total_weight


def _is_finite(update: PlainUpdateUploaded, blobs: BlobStore) -> bool:
    num_values = update.size // VALUE.itemsize
    return all(np.isfinite(block).all() for _, [block] in _blocks([update], num_values, blobs))


def _blocks(
    updates: list[PlainUpdateUploaded], num_values: int, blobs: BlobStore
) -> Iterator[tuple[int, list[Vector]]]:
    """Give all updates' coordinates block by block, each block with its place."""
    files = [np.memmap(blobs.path(update.digest), VALUE, mode="r") for update in updates]
    for start in range(0, num_values, _BLOCK_VALUES):
        yield start, [file[start : start + _BLOCK_VALUES] for file in files]
