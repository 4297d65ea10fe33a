"""What the members of a round agree on; every signature and every key binds its digest."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256

from minga.federation.secagg.encoding import encode
from minga.federation.secagg.errors import PlanError
from minga.federation.secagg.masking import MASK_KEY_BYTES
from minga.federation.secagg.packing import packed_size
from minga.federation.secagg.rotation import padded_size
from minga.federation.secagg.sizing import MIN_COHORT, choose_neighbourhood

ROUND_ID_BYTES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """The numbers of one round.

    A device checks a plan by making it: one that would let a lying coordinator see a single update
    is refused, whoever sent it.

    Raises:
        PlanError: the numbers cannot work together, or are not safe.
    """

    round_id: bytes
    """16 random bytes."""
    context_digest: bytes
    """What the round is about (see `context_digest`), 32 bytes."""
    num_values: int
    """Coordinates of the model, without the one that carries the weight."""
    max_cohort: int
    """The most updates that can be summed without overflow."""
    num_neighbours: int
    """Degree of the masking graph: even, or `max_cohort - 1` for the complete graph."""
    threshold: int
    """How many neighbours must help to rebuild a secret."""
    value_bits: int
    """Bits of one rounded coordinate of one device, sign included."""
    clip: float
    """Coordinates are clipped to [-clip, clip], after the rotation if there is one."""
    max_weight: int
    """The largest weight of one device."""
    rotate: bool = False
    """Updates are rotated before they are clipped and rounded (see `rotation`)."""

    def __post_init__(self) -> None:
        self._check_names()
        self._check_graph()
        self._check_numbers()

    @property
    def ring_bits(self) -> int:
        """Bits of one summed coordinate: the ring is Z modulo 2 to this power."""
        return self.value_bits + (self.max_cohort - 1).bit_length()

    @property
    def max_level(self) -> int:
        """The largest rounded coordinate of one device; levels are symmetric around zero."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def num_coordinates(self) -> int:
        """Coordinates that carry the update: the model's, padded if they are rotated."""
        return padded_size(self.num_values) if self.rotate else self.num_values

    @property
    def vector_length(self) -> int:
        """Coordinates that travel: the update's, then the weight."""
        return self.num_coordinates + 1

    @property
    def upload_size(self) -> int:
        """Bytes of one masked update."""
        return packed_size(self.vector_length, self.ring_bits)

    @property
    def digest(self) -> bytes:
        """SHA-256 over all fields."""
        return _digest(self)

    @property
    def rotation_key(self) -> bytes:
        """What the rotation's signs are drawn from: public, another one in each round."""
        return sha256(encode("rotation", self.digest)).digest()[:MASK_KEY_BYTES]

    def _check_names(self) -> None:
        if len(self.round_id) != ROUND_ID_BYTES:
            raise PlanError(f"round_id has {len(self.round_id)} bytes; give {ROUND_ID_BYTES}")
        if len(self.context_digest) != sha256().digest_size:
            raise PlanError(
                f"context_digest has {len(self.context_digest)} bytes; give a SHA-256 digest"
            )

    def _check_graph(self) -> None:
        cohort, degree = self.max_cohort, self.num_neighbours
        if cohort < MIN_COHORT:
            raise PlanError(
                f"max_cohort is {cohort}; a sum hides an update among {MIN_COHORT} or more"
            )
        if not 2 <= degree < cohort or (degree % 2 and degree != cohort - 1):
            raise PlanError(
                f"num_neighbours is {degree}; give an even number from 2 on, or {cohort - 1} "
                f"for the complete graph over {cohort} devices"
            )
        # With 2t > k no two disjoint sets of neighbours hold t shares each, so a coordinator that
        # tells one half that a device survived and the other half that it dropped out cannot
        # rebuild both of its secrets (Bonawitz et al., section 6); `sizing` adds the colluders.
        if not degree < 2 * self.threshold <= 2 * degree:
            raise PlanError(
                f"threshold is {self.threshold}; it must be more than half of the {degree} "
                f"neighbours and at most all of them"
            )

    def _check_numbers(self) -> None:
        if self.num_values < 1:
            raise PlanError(f"num_values is {self.num_values}; a model has at least one")
        if not math.isfinite(self.clip) or self.clip <= 0:
            raise PlanError(f"clip is {self.clip}; give a positive number")
        if self.value_bits < 2 or self.ring_bits > 32:
            raise PlanError(
                f"value_bits is {self.value_bits}; a sum over {self.max_cohort} devices takes "
                f"{self.ring_bits} bits: give at least 2, and so few that it fits in 32"
            )
        if not 1 <= self.max_weight <= self.max_level:
            raise PlanError(
                f"max_weight is {self.max_weight}; with {self.value_bits} value_bits it must be "
                f"between 1 and {self.max_level}"
            )


@lru_cache(maxsize=64)  # every key, signature and ciphertext of a round asks for it
def _digest(plan: RoundPlan) -> bytes:
    return sha256(
        encode(
            "plan",
            plan.round_id,
            plan.context_digest,
            plan.num_values,
            plan.max_cohort,
            plan.num_neighbours,
            plan.threshold,
            plan.value_bits,
            float(plan.clip),
            plan.max_weight,
            # Left out where it is off, so that devices which do not know it agree on the digest.
            *((True,) if plan.rotate else ()),
        )
    ).digest()


def derive_plan(
    *,
    round_id: bytes,
    context_digest: bytes,
    num_values: int,
    cohort_size: int,
    clip: float,
    value_bits: int,
    max_weight: int,
    rotate: bool = False,
    expected_dropout: float = 0.2,
    colluder_share: float = 0.1,
) -> RoundPlan:
    """Make the plan for a cohort: the graph and threshold follow from what is to be borne.

    See `sizing.choose_neighbourhood` for the formula and its source.

    Raises:
        PlanError: the cohort is too small for both shares, or other numbers do not fit.
    """
    neighbourhood = choose_neighbourhood(cohort_size, expected_dropout, colluder_share)
    return RoundPlan(
        round_id=round_id,
        context_digest=context_digest,
        num_values=num_values,
        max_cohort=cohort_size,
        num_neighbours=neighbourhood.num_neighbours,
        threshold=neighbourhood.threshold,
        value_bits=value_bits,
        clip=clip,
        max_weight=max_weight,
        rotate=rotate,
    )


def context_digest(model_digest: bytes, training: Mapping[str, bool | int | float | str]) -> bytes:
    """Name what all members of a round must do alike: start from this model, train like this.

    Without it a coordinator could send the victim the true model and everybody else one whose
    update is known in advance, for instance zero; the sum would then be the victim's update
    (Pasquini et al., "Eluding secure aggregation in federated learning via model inconsistency",
    CCS 2022). Devices that were told different things here derive different keys, and nothing
    cancels. A device must compute it from what it really uses, not copy it from a message.

    Args:
        model_digest: SHA-256 of the global model.
        training: The training configuration.
    """
    pairs = [field for name in sorted(training) for field in (name, training[name])]
    return sha256(encode("context", model_digest, *pairs)).digest()
