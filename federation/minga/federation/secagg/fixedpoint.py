"""Real updates as ring values, and their sum back as a weighted mean.

A device with weight w contributes, for each coordinate x of its update,

    level = stochastic_round(clip(x) * w / max_weight * max_level / clip)

and one more coordinate, w itself: how many examples a site has is masked like everything else. The
sum of the levels divided by the sum of the weights is the weighted mean. If the plan says so, the
update is rotated before (`rotation`), and the mean rotated back.

Error: one level is `step = clip / max_level * max_weight / W` of the mean, W being the total
weight. A rounded level is off by less than one, so over n devices each coordinate of the mean is
off by less than `n * step` (if all weights are max_weight: less than `clip / max_level`), plus
float32's own rounding. The error has mean zero: rounding up happens with the probability that the
fraction asks for, to 2**-32; so its standard deviation is at most `sqrt(n) / 2 * step`, and it
exceeds `step * sqrt(n / 2 * ln(2 / p))` with probability at most p (Hoeffding, JASA 1963). Zero
stays zero.

A rotation back mixes the errors of a block of B coordinates, each divided by sqrt(B): what is said
of the deviation and of p holds as it stands, the strict bound becomes `sqrt(B) * n * step`.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from minga.federation.memory import BLOCK_VALUES
from minga.federation.secagg.errors import SumError, UpdateError
from minga.federation.secagg.masking import MASK_KEY_BYTES, Keystream, new_scratch
from minga.federation.secagg.plan import RoundPlan
from minga.federation.secagg.rotation import rotate, rotate_back


def encode_update(
    plan: RoundPlan,
    delta: NDArray[np.float32],
    weight: int,
    random_bytes: Callable[[int], bytes],
) -> NDArray[np.uint32]:
    """Rotate if planned, clip, weigh and round an update to levels, two's complement in uint32.

    Args:
        plan: The round's numbers.
        delta: The update, float32, shape `(num_values,)`.
        weight: How much it counts, 1 to `max_weight`; usually the number of examples.
        random_bytes: Source of randomness for the rounding.

    Returns:
        Shape `(vector_length,)`; the last one is the weight.

    Raises:
        UpdateError: another shape or type, NaN or infinity, or a weight out of range.
    """
    _check_update(plan, delta, weight)
    share = weight / plan.max_weight
    factor, limit = share * plan.max_level / plan.clip, share * plan.max_level
    coins, scratch = Keystream(random_bytes(MASK_KEY_BYTES)), new_scratch()
    levels = np.empty(plan.vector_length, np.uint32)
    levels[-1] = weight
    coordinates = rotate(delta, plan.rotation_key) if plan.rotate else delta
    for low in range(0, coordinates.size, BLOCK_VALUES):
        block = coordinates[low : low + BLOCK_VALUES].astype(np.float64)
        if not np.isfinite(block).all():
            raise UpdateError(
                "the update holds NaN or infinity; training diverged: lower its learning rate"
            )
        np.clip(block * factor, -limit, limit, out=block)
        # floor(x + u), u uniform in [0, 1), is x rounded up with the probability of its fraction.
        block += coins.next_into(scratch, block.size) * 2.0**-32
        levels[low : low + block.size] = np.floor(block, out=block).astype(np.int32).view(np.uint32)
    return levels


def decode_sum(
    plan: RoundPlan, levels: NDArray[np.uint32], num_devices: int
) -> tuple[NDArray[np.float32], int]:
    """Read the weighted mean, rotated back if need be, and the total weight from an unmasked sum.

    Args:
        plan: The round's numbers.
        levels: The sum modulo 2**32, of which the low `ring_bits` count; shape `(vector_length,)`.
        num_devices: How many updates are in it.

    Returns:
        The mean, float32, shape `(num_values,)`; and the total weight.

    Raises:
        SumError: no honest updates have this sum: a device sent something else, or masks are left.
    """
    total_weight = int(_signed(levels[-1:], plan.ring_bits)[0])
    if not num_devices <= total_weight <= num_devices * plan.max_weight:
        raise SumError(
            f"the unmasked sum has a total weight of {total_weight}, impossible for "
            f"{num_devices} devices: one of them sent no honestly encoded update"
        )
    limit = plan.max_level * total_weight / plan.max_weight + num_devices
    factor = plan.clip / plan.max_level * plan.max_weight / total_weight
    mean = np.empty(plan.num_coordinates, np.float32)
    for low in range(0, mean.size, BLOCK_VALUES):
        high = min(low + BLOCK_VALUES, mean.size)
        block = _signed(levels[low:high], plan.ring_bits).astype(np.float64)
        if np.abs(block).max() > limit:
            raise SumError(
                "the unmasked sum lies outside what clipped updates can reach: a device sent no "
                "honestly encoded update"
            )
        mean[low:high] = block * factor
    if plan.rotate:
        mean = rotate_back(mean, plan.num_values, plan.rotation_key)
    return mean, total_weight


def _check_update(plan: RoundPlan, delta: NDArray[np.float32], weight: int) -> None:
    if delta.dtype != np.float32 or delta.shape != (plan.num_values,):
        raise UpdateError(
            f"the update is {delta.dtype} of shape {delta.shape}, expected float32 of shape "
            f"({plan.num_values},)"
        )
    if not 1 <= weight <= plan.max_weight:
        raise UpdateError(
            f"the update has weight {weight}, expected 1 to {plan.max_weight}; cap the weight, or "
            "raise the federation's max_weight"
        )


def _signed(levels: NDArray[np.uint32], ring_bits: int) -> NDArray[np.int32]:
    """Read the low bits as two's complement: shift them up as unsigned, down as signed."""
    spare = 32 - ring_bits
    return (levels << np.uint32(spare)).view(np.int32) >> np.int32(spare)
