"""Many contributions in, one mean update out, in bounded memory.

Contributions are read twice, block by block: once to leave out what is not finite and to measure
the rest (`contributions.survey`), once to make the result. A rule never sees a contribution that
was left out. The plain mean knows what each contribution counts before it has seen any: it reads
them once, and again only if one of them turns out not to be finite.
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
    misfit,
    single_blocks,
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
    """Euclidean lengths of those counted, as they came."""
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
    if type(rule) is Mean and rule.clip is None:
        mean = _mean(rule, contributions, out, block_bytes)
        if mean is not None:
            return mean
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
            _add_up(found, shares, out, block_bytes)
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


def _mean(
    rule: Mean, contributions: Sequence[Contribution], out: Vector, block_bytes: int
) -> Combined | None:
    """Make the mean at the first look; None, and no use of `out`, if one had to be left out."""
    rule.require_enough(len(contributions))
    if any(misfit(one, out.size) is not None for one in contributions):
        return None
    weights = np.array([one.weight for one in contributions], np.float64)
    shares = rule.coefficients(np.empty((0, 0)), weights)

    def add_up(block: slice) -> list[float]:
        total, squares = np.zeros(block.stop - block.start), []
        with np.errstate(over="ignore", invalid="ignore"):  # it is seen in the squares
            for one, share in zip(contributions, shares, strict=True):
                part = one.read(block.start, block.stop).astype(np.float64)
                squares.append(float(part @ part))
                total += np.multiply(part, share, out=part)
            out[block] = total
        return squares

    found = in_parallel(add_up, single_blocks(out.size, block_bytes))
    lengths = np.sqrt(np.sum(found, axis=0))
    if not np.isfinite(lengths).all():
        return None
    return Combined(
        counted=tuple(one.name for one in contributions),
        rejected={},
        clipped=(),
        lengths=tuple(lengths.tolist()),
        total_weight=sum(one.weight for one in contributions),
    )


def _add_up(found: Survey, shares: Wide, out: Vector, block_bytes: int) -> None:
    """Make the sum of contributions, each times its share; one without a share is not read."""

    def add_up(block: slice) -> None:
        total = np.zeros(block.stop - block.start)
        for one, share in zip(found.sound, shares, strict=True):
            if share != 0.0:
                part = one.read(block.start, block.stop).astype(np.float64)
                total += np.multiply(part, share, out=part)
        out[block] = total

    in_parallel(add_up, single_blocks(out.size, block_bytes))


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
