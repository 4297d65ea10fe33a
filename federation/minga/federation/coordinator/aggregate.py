"""From masked uploads on the disk to the next global model."""

import logging

from minga.federation.aggregation.optimizers import (
    ServerOptimizer,
    Vector,
    advance,
    initial_state,
)
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.rounds import Round, SumComputed
from minga.federation.errors import StorageError
from minga.federation.parameters import read_layout, read_tensors, to_bytes
from minga.federation.secagg.coordinator import MaskedSum, Unmasked, unmask

_log = logging.getLogger(__name__)


def aggregate(
    round_: Round, blobs: BlobStore, optimizer: ServerOptimizer, optimizer_digest: bytes
) -> SumComputed:
    """Add the masked updates, unmask their sum, and let the server optimiser take its step.

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
        StepError: the next model would not be finite.
        StorageError: the disk fails.
    """
    try:
        result = _unmasked_sum(round_, blobs)
        model = blobs.path(round_.order.model_digest)
        values = result.mean_delta  # from here on the next model grows in it
        state = _state(optimizer, blobs, optimizer_digest, values.size)
        start = 0
        for tensor in read_tensors(model):
            part = slice(start, start + tensor.size)
            kept = {name: vector[part] for name, vector in state.items()}
            advance(optimizer, kept, tensor.ravel(), values[part])
            start += tensor.size
        return SumComputed(
            model_digest=blobs.put_bytes(to_bytes(read_layout(model).unflatten(values))),
            total_weight=result.total_weight,
            optimizer_digest=blobs.put_bytes(to_bytes(state)) if state else b"",
        )
    except OSError as error:
        raise StorageError(f"the coordinator's disk fails ({error}); free space on it") from error


def _state(
    optimizer: ServerOptimizer, blobs: BlobStore, digest: bytes, num_values: int
) -> dict[str, Vector]:
    """Read what the optimiser kept, each vector as long as the model."""
    if not digest:
        return initial_state(optimizer, num_values)
    path = blobs.path(digest)
    return dict(zip(read_layout(path).names, read_tensors(path), strict=True))


def _unmasked_sum(round_: Round, blobs: BlobStore) -> Unmasked:
    plan = round_.order.plan
    masked = MaskedSum(plan)
    for device_id in round_.survivors:
        masked.add_chunks(blobs.chunks(round_.updates[device_id].digest))
    result = unmask(
        plan=plan,
        graph=round_.graph,
        adverts=round_.adverts,
        sharers=round_.sharers,
        survivors=round_.survivors,
        reveals=round_.reveals,
        masked_sum=masked,
    )
    if result.liars:
        _log.warning("round %s: false shares from %s", round_.order.round_id, result.liars)
    return result
