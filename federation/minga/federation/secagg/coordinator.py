"""The coordinator's side of a round: checks on what devices send, the masked sum, its unmasking.

The coordinator learns the sum of the survivors' updates and nothing else. It checks what it can
see, so that one device's bad message costs that device its place and not the others their round;
devices check again, since they do not trust it.

Memory: one uint32 accumulator, one packed upload and one float32 result, whatever the cohort.

Not here: who is in which stage and when it ends (`minga.federation.coordinator.rounds`).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minga.federation.secagg.errors import MessageError, QuorumError, StateError
from minga.federation.secagg.fixedpoint import decode_sum
from minga.federation.secagg.masking import ApplyMasks, apply_masks_threaded
from minga.federation.secagg.messages import Advert, EncryptedShare, Reveal
from minga.federation.secagg.packing import Buffer, add_packed
from minga.federation.secagg.plan import RoundPlan
from minga.federation.secagg.signing import check_advert, check_confirmation
from minga.federation.secagg.unmasking import Graph, can_unmask, recover_masks

__all__ = [
    "MaskedSum",
    "Unmasked",
    "can_unmask",
    "check_advert",
    "check_confirmation",
    "check_reveal",
    "check_shares",
    "unmask",
]


def check_shares(graph: Graph, sender: str, shares: Iterable[EncryptedShare]) -> None:
    """Refuse shares that are not one for each of the sender's neighbours.

    Args:
        graph: Neighbours among the devices that advertised keys.
        sender: Who sent the shares.
        shares: What it sent.

    Raises:
        MessageError: a neighbour is missing, doubled or strange, or another sender is named.
    """
    shares = list(shares)
    receivers = sorted(share.receiver for share in shares)
    if {share.sender for share in shares} != {sender} or receivers != sorted(graph[sender]):
        raise MessageError(f"{sender} did not share with exactly its neighbours", [sender])


def check_reveal(
    graph: Graph, sharers: Collection[str], survivors: Collection[str], reveal: Reveal
) -> None:
    """Refuse shares that were not asked for: the coordinator does not want to know them.

    Raises:
        MessageError: a share of a stranger, or of the secret that must stay hidden.
    """
    peers = set(graph.get(reveal.device_id, ())) & set(sharers)
    alive = peers & set(survivors)
    unasked = (reveal.self_seed_shares.keys() - alive) | (
        reveal.mask_key_shares.keys() - (peers - alive)
    )
    if unasked:
        raise MessageError(
            f"{reveal.device_id} revealed shares of {sorted(unasked)} that nobody asked for",
            [reveal.device_id],
        )


class MaskedSum:
    """The running sum of masked uploads: uniform bits until it is unmasked.

    Not safe for threads.
    """

    def __init__(self, plan: RoundPlan) -> None:
        self._plan = plan
        self._levels: NDArray[np.uint32] | None = np.zeros(plan.vector_length, np.uint32)
        self._num_updates = 0

    @property
    def plan(self) -> RoundPlan:
        """The numbers of the round that this is the sum of."""
        return self._plan

    @property
    def num_updates(self) -> int:
        """How many uploads are in the sum."""
        return self._num_updates

    def add(self, upload: Buffer) -> None:
        """Add one upload, or nothing at all.

        Raises:
            MessageError: it is cut off, too long, or padded with something else than zeros.
            StateError: the sum was taken already.
        """
        add_packed(self._open(), upload, self._plan.ring_bits)
        self._num_updates += 1

    def add_chunks(self, chunks: Iterable[Buffer]) -> None:
        """Add one upload that comes in pieces of any size, or nothing at all.

        Raises:
            MessageError: see `add`.
            StateError: the sum was taken already.
        """
        upload = bytearray(self._plan.upload_size)
        filled = 0
        for chunk in chunks:
            end = filled + len(chunk)
            if end > len(upload):
                raise MessageError(f"an upload is longer than the {len(upload)} bytes of the round")
            upload[filled:end] = chunk
            filled = end
        self.add(memoryview(upload)[:filled])

    def take(self) -> NDArray[np.uint32]:
        """Hand the accumulator over, shape `(vector_length,)`; nothing can be added any more.

        Raises:
            StateError: the sum was taken already.
        """
        levels = self._open()
        self._levels = None
        return levels

    def _open(self) -> NDArray[np.uint32]:
        if self._levels is None:
            raise StateError("the masked sum was taken already")
        return self._levels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unmasked:
    """What a round brought."""

    mean_delta: NDArray[np.float32]
    """Weighted mean of the survivors' updates, shape `(num_values,)`."""
    total_weight: int
    """Sum of their weights."""
    liars: tuple[str, ...]
    """Devices whose false shares had to be left out; the result is right in spite of them."""


def unmask(
    *,
    plan: RoundPlan,
    graph: Graph,
    adverts: Mapping[str, Advert],
    sharers: Collection[str],
    survivors: Collection[str],
    reveals: Mapping[str, Reveal],
    masked_sum: MaskedSum,
    apply: ApplyMasks = apply_masks_threaded,
) -> Unmasked:
    """Take the masks off the sum and read the weighted mean.

    If secrets cannot be rebuilt the sum is left as it was: with more reveals it can be tried again.

    Args:
        plan: The round's numbers.
        graph: Device -> its neighbours among those that advertised keys.
        adverts: The adverts that were handed on.
        sharers: The devices whose shares were handed on.
        survivors: The devices whose uploads are in the sum: the list that was confirmed.
        reveals: Device -> what it revealed.
        masked_sum: The sum; it is taken.
        apply: Takes masks off; by default threads of this process, as many as there are cores.

    Raises:
        StateError: the sum is not the sum of this round's survivors.
        QuorumError: too few survivors, or a secret has fewer shares than the threshold.
        ShareError: a secret's shares are false, and no choice of them gives the true one.
        SumError: the unmasked sum is not one of honestly encoded updates.
    """
    if masked_sum.plan != plan or masked_sum.num_updates != len(survivors):
        raise StateError(
            f"the sum holds {masked_sum.num_updates} updates of its round, the list of survivors "
            f"has {len(survivors)}"
        )
    if len(survivors) <= plan.threshold:
        raise QuorumError(
            f"{len(survivors)} updates are in the sum, {plan.threshold + 1} are needed"
        )
    if not set(survivors) <= set(sharers):
        raise StateError("a survivor never shared its secrets")
    recovery = recover_masks(
        plan=plan,
        graph=graph,
        adverts=adverts,
        sharers=sharers,
        survivors=survivors,
        reveals=reveals,
    )
    levels = masked_sum.take()
    apply(levels, recovery.masks)
    mean_delta, total_weight = decode_sum(plan, levels, len(survivors))
    return Unmasked(mean_delta=mean_delta, total_weight=total_weight, liars=recovery.liars)
