"""From masked uploads on the disk to the next global model."""

import logging

from minga.federation.aggregation.mean import apply_mean
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.rounds import Round, SumComputed
from minga.federation.errors import StorageError
from minga.federation.parameters import read_layout, read_tensors, to_bytes
from minga.federation.secagg.coordinator import MaskedSum, Unmasked, unmask

_log = logging.getLogger(__name__)


def aggregate(round_: Round, blobs: BlobStore, server_learning_rate: float) -> SumComputed:
    """Add the masked updates, unmask their sum, move the global model by the mean.

    Memory is three times the model, whatever the cohort: uploads are added in pieces as they are
    read, and the new model takes the mean's place tensor by tensor. Doing it again gives the same
    model, so a crash in the middle costs time only.

    Raises:
        FederationError: a secret cannot be rebuilt, or an upload is gone.
        StorageError: the disk fails.
        ValueError: the new model would not be finite.
    """
    try:
        result = _unmasked_sum(round_, blobs)
        model = blobs.path(round_.order.model_digest)
        values = result.mean_delta  # from here on the new model grows in it
        start = 0
        for tensor in read_tensors(model):
            place = values[start : start + tensor.size]
            place[:] = apply_mean(tensor.ravel(), place, server_learning_rate)
            start += tensor.size
        digest = blobs.put_bytes(to_bytes(read_layout(model).unflatten(values)))
    except OSError as error:
        raise StorageError(f"the coordinator's disk fails ({error}); free space on it") from error
    return SumComputed(model_digest=digest, total_weight=result.total_weight)


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
