"""Many contributions in, one mean update out, in bounded memory.

Contributions are read twice, block by block: once to leave out what is not finite and to measure
the rest (`contributions.survey`), once to make the result. A rule never sees a contribution that
was left out. A plain mean needs no measures, and shows by itself whether all was finite: then it is
made at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minga.federation.aggregation.contributions import (
    BLOCK_BYTES,
    Contribution,
    Survey,
    Vector,
    Wide,
    blocks,
    in_parallel,
    single_blocks,
    sort_out,
    survey,
)
from minga.federation.aggregation.rules import CoordinateRule, LinearRule, Mean, Rule


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """What became of the contributions."""

    counted: tuple[str, ...]
    """Those that the rule saw."""
    rejected: Mapping[str, str]
    """Those that it did not, and why."""
    clipped: tuple[str, ...]
    """Those that were shortened before the rule."""
    lengths: tuple[float, ...]
    """Euclidean lengths of those counted, as they came; none if the rule goes by no lengths."""
    total_weight: int
    """Sum of the weights of those counted."""


def combine(
    rule: Rule,
    contributions: Sequence[Contribution],
    out: Vector,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> Combined:
    """Make one mean update of contributions.

    Memory beside `out` is bounded by `block_bytes` for blocks and 40 n² bytes for n contributions,
    whatever the model's length. The result does not depend on `block_bytes`, but for the last bit
    of sums in float64 where a rule needs inner products.

    Args:
        rule: which rule.
        contributions: under different names; they are read twice.
        out: gets the mean update, shape `(num_values,)`; may be the values of the one
            contribution, if there is one alone.
        block_bytes: how much memory blocks may take.

    Returns:
        Who was counted, and who was left out and why.

    Raises:
        RuleError: too few sound contributions for the rule; `out` is of no use then.
    """
    if isinstance(rule, Mean) and rule.clip is None:
        at_once = _mean_at_once(rule, contributions, out, block_bytes)
        if at_once is not None:
            return at_once
    found = survey(
        contributions,
        out.size,
        all_products=isinstance(rule, LinearRule) and rule.needs_products,
        block_bytes=block_bytes,
    )
    rule.require_enough(len(found.sound))
    factors = np.ones(len(found.sound)) if rule.clip is None else rule.clip.factors(found.norms)
    match rule:
        case LinearRule():
            products = found.products * np.outer(factors, factors)
            shares = rule.coefficients(products, found.weights) * factors
            _add_up(found.sound, shares, out, block_bytes)
        case CoordinateRule():
            _reduce(rule, found, factors, out, block_bytes)
        case _:
            raise AssertionError(f"{type(rule).__name__} is neither linear nor by coordinate")
    return Combined(
        counted=tuple(one.name for one in found.sound),
        rejected=found.rejected,
        clipped=tuple(
            one.name for one, factor in zip(found.sound, factors, strict=True) if factor < 1.0
        ),
        lengths=tuple(found.norms.tolist()),
        total_weight=sum(one.weight for one in found.sound),
    )


def _mean_at_once(
    rule: Mean, contributions: Sequence[Contribution], out: Vector, block_bytes: int
) -> Combined | None:
    """Make the mean in one look; None if it is not finite, as NaN or infinity in any one makes it.

    Finite float32 values cannot: they are added up in float64, and no mean is larger than they are.
    """
    fitting, rejected = sort_out(contributions, out.size)
    rule.require_enough(len(fitting))
    weights = np.array([one.weight for one in fitting], np.float64)
    if not _add_up(fitting, rule.shares(weights), out, block_bytes):
        return None
    return Combined(
        counted=tuple(one.name for one in fitting),
        rejected=rejected,
        clipped=(),
        lengths=(),
        total_weight=sum(one.weight for one in fitting),
    )


def _add_up(
    contributions: Sequence[Contribution], shares: Wide, out: Vector, block_bytes: int
) -> bool:
    """Make the sum of contributions, each times its share; one without a share is not read.

    Returns:
        Whether it is finite.
    """

    def add_up(block: slice) -> bool:
        total = np.zeros(block.stop - block.start)
        for one, share in zip(contributions, shares, strict=True):
            if share != 0.0:
                part = one.read(block.start, block.stop).astype(np.float64)
                total += np.multiply(part, share, out=part)
        out[block] = total
        return bool(np.isfinite(total).all())

    return all(in_parallel(add_up, single_blocks(out.size, block_bytes)))


def _reduce(
    rule: CoordinateRule, found: Survey, factors: Wide, out: Vector, block_bytes: int
) -> None:
    """Make each coordinate's value of all contributions' values."""
    for block in blocks(out.size, len(found.sound), block_bytes):
        rows = np.empty((len(found.sound), block.stop - block.start), np.float32)
        for row, one, factor in zip(rows, found.sound, factors, strict=True):
            np.multiply(one.read(block.start, block.stop), np.float32(factor), out=row)
        rows.sort(axis=0)
        out[block] = rule.reduce(rows)
