"""Contributions and rules that tests of aggregation share."""

from collections.abc import Sequence

import numpy as np

from minga.federation.aggregation.combination import Combined, combine
from minga.federation.aggregation.contributions import VectorContribution
from minga.federation.aggregation.rules import (
    Clip,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    Rule,
    TrimmedMean,
)

LIAR_SHARE = 0.25

RULES: tuple[Rule, ...] = (
    Mean(),
    Median(),
    TrimmedMean(liar_share=LIAR_SHARE),
    Krum(liar_share=LIAR_SHARE),
    MultiKrum(liar_share=LIAR_SHARE),
    GeometricMedian(),
)

ROBUST = RULES[1:]


def contributions_of(
    rows: np.ndarray, weights: Sequence[int] | None = None
) -> list[VectorContribution]:
    """Name the rows of a matrix d0, d1, ..., of weight 1 unless told otherwise."""
    return [
        VectorContribution(
            name=f"d{number}",
            values=row.astype(np.float32),
            weight=1 if weights is None else weights[number],
        )
        for number, row in enumerate(rows)
    ]


def combined(
    rule: Rule, rows: np.ndarray, weights: Sequence[int] | None = None
) -> tuple[np.ndarray, Combined]:
    """Apply a rule to the rows of a matrix."""
    out = np.full(rows.shape[1], np.nan, np.float32)
    return out, combine(rule, contributions_of(rows, weights), out)


def result(rule: Rule, rows: np.ndarray, weights: Sequence[int] | None = None) -> np.ndarray:
    """Give what a rule makes of the rows of a matrix."""
    return combined(rule, rows, weights)[0]


def rule_name(rule: Rule) -> str:
    """Name a rule in a test's id."""
    return type(rule).__name__ + ("" if rule.clip is None else " clipped")


CLIPPED = (Mean(clip=Clip()), Median(clip=Clip(max_norm=1.0)), GeometricMedian(clip=Clip()))
