"""From masked uploads on the disk to the next global model."""

import logging

from minga.federation.aggregation.mean import apply_mean
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.rounds import Round, SumComputed
from minga.federation.parameters import Layout, from_bytes, to_bytes
from minga.federation.secagg.coordinator import MaskedSum, unmask

_log = logging.getLogger(__name__)


def aggregate(round_: Round, blobs: BlobStore, server_learning_rate: float) -> SumComputed:
    """Add the masked updates, unmask their sum, move the global model by the mean.

    Memory is O(model), whatever the cohort: uploads are added in pieces as they are read. Doing it
    again gives the same model, so a crash in the middle costs time only.

    Raises:
        FederationError: a secret cannot be rebuilt, or an upload is gone.
    """
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
    parameters = from_bytes(blobs.read(round_.order.model_digest))
    layout = Layout.of(parameters)
    vector = apply_mean(layout.flatten(parameters), result.mean_delta, server_learning_rate)
    digest = blobs.put_bytes(to_bytes(layout.unflatten(vector)))
    return SumComputed(model_digest=digest, total_weight=result.total_weight)
