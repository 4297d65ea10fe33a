"""What holds for rules whatever the contributions: symmetry, bounds under lies, memory."""

import tracemalloc
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.federation.aggregation.combination import combine
from minga.federation.aggregation.contributions import BLOCK_BYTES, VectorContribution
from minga.federation.aggregation.rules import (
    GeometricMedian,
    Krum,
    Median,
    MultiKrum,
    Rule,
    TrimmedMean,
)

from .rule_cases import (
    CLIPPED,
    LIAR_SHARE,
    ROBUST,
    RULES,
    contributions_of,
    result,
    rule_name,
)

ALL = pytest.mark.parametrize("rule", RULES, ids=rule_name)
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(5, 20).filter(lambda num: num >= 2 * int(LIAR_SHARE * num) + 3)


def honest_rows(seed: int, num: int, num_values: int = 6) -> np.ndarray:
    """Draw updates that agree somewhat, of unlike sizes."""
    random = np.random.default_rng(seed)
    common = random.normal(size=num_values)
    spread = random.lognormal(size=(num, 1))
    return (common + spread * random.normal(size=(num, num_values))).astype(np.float32)


@ALL
@settings(max_examples=30)
@given(seed=seeds, num=sizes)
def test_order_does_not_matter(rule: Rule, seed: int, num: int) -> None:
    """Who came first makes no difference."""
    rows = honest_rows(seed, num)
    order = np.random.default_rng(seed).permutation(num)
    np.testing.assert_allclose(result(rule, rows[order]), result(rule, rows), rtol=1e-4, atol=1e-5)


@ALL
@settings(max_examples=30)
@given(seed=seeds, num=sizes, by=st.floats(-8, 8, width=32))
def test_moves_with_its_contributions(rule: Rule, seed: int, num: int, by: float) -> None:
    """If all contributions move by the same vector, so does the result."""
    rows = honest_rows(seed, num)
    moved = result(rule, rows + np.float32(by))
    np.testing.assert_allclose(moved, result(rule, rows) + np.float32(by), atol=2e-4)


@ALL
@settings(max_examples=30)
@given(seed=seeds, num=sizes)
def test_agreement_is_kept(rule: Rule, seed: int, num: int) -> None:
    """What all say is the result: every rule is the mean then."""
    rows = np.repeat(honest_rows(seed, 1), num, axis=0)
    np.testing.assert_allclose(result(rule, rows), rows[0], rtol=1e-6)


@pytest.mark.parametrize("rule", [*RULES, *CLIPPED], ids=rule_name)
@settings(max_examples=20)
@given(seed=seeds, num=sizes, block_values=st.integers(1, 40))
def test_blocks_do_not_show(rule: Rule, seed: int, num: int, block_values: int) -> None:
    """Blocks of any size give the same result, to float32's rounding."""
    rows = honest_rows(seed, num, 37)
    out = np.empty(37, np.float32)
    combine(rule, contributions_of(rows), out, block_bytes=16 * num * block_values)
    np.testing.assert_allclose(out, result(rule, rows), rtol=1e-5, atol=1e-6)


# --- under lies ---

lies = st.sampled_from(["huge", "flipped", "scattered", "one coordinate", "one point", "alike"])


def with_liars(rule: Rule, honest: np.ndarray, seed: int, kind: str, scale: float) -> np.ndarray:
    """Put as many liars among the honest as the rule bears."""
    random, num = np.random.default_rng(seed), len(honest)
    most = max(liars for liars in range(num) if rule.num_liars(num + liars) >= liars)
    shape = (most, honest.shape[1])
    centre = honest.mean(axis=0)
    told = {
        "huge": np.full(shape, 1e30),
        "flipped": np.tile(-scale * centre, (shape[0], 1)),
        "scattered": scale * random.normal(size=shape),
        "one coordinate": centre + scale * np.eye(shape[1])[random.integers(shape[1], size=1)],
        "one point": np.tile(scale * random.normal(size=shape[1]), (shape[0], 1)),
        "alike": honest[: shape[0]] + scale * 1e-3,
    }[kind]
    rows = np.concatenate([honest, np.broadcast_to(told, shape)]).astype(np.float32)
    return random.permutation(rows)


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(liar_share=LIAR_SHARE)], ids=rule_name)
@settings(max_examples=100)
@given(seed=seeds, num=st.integers(4, 15), kind=lies, scale=st.floats(-1e6, 1e6))
def test_coordinates_stay_within_the_honest(
    rule: Rule, seed: int, num: int, kind: str, scale: float
) -> None:
    """With as many liars as it bears, each coordinate is between two honest ones."""
    honest = honest_rows(seed, num)
    moved = result(rule, with_liars(rule, honest, seed, kind, scale))
    tolerance = 1e-6 * np.abs(honest).max(axis=0)
    assert (moved >= honest.min(axis=0) - tolerance).all()
    assert (moved <= honest.max(axis=0) + tolerance).all()


@settings(max_examples=100)
@given(seed=seeds, num=st.integers(3, 15), kind=lies, scale=st.floats(-1e6, 1e6))
def test_geometric_median_keeps_its_published_bound(
    seed: int, num: int, kind: str, scale: float
) -> None:
    """It is within 2 (n - f) / (n - 2f) honest radii of the honest (Chen et al., lemma 1)."""
    honest = honest_rows(seed, num)
    rule = GeometricMedian()
    rows = with_liars(rule, honest, seed, kind, scale)
    n, f = len(rows), len(rows) - num
    centre = honest.mean(axis=0)
    radius = np.linalg.norm(honest - centre, axis=1).max()
    moved = result(rule, rows).astype(np.float64)
    assert np.linalg.norm(moved - centre) <= 2 * (n - f) / (n - 2 * f) * radius * (1 + 1e-5)


@pytest.mark.parametrize(
    "rule", [Krum(liar_share=LIAR_SHARE), MultiKrum(liar_share=LIAR_SHARE)], ids=rule_name
)
@settings(max_examples=100)
@given(seed=seeds, num=st.integers(5, 15), kind=lies, scale=st.floats(-1e6, 1e6))
def test_krum_stays_near_the_honest(
    rule: MultiKrum, seed: int, num: int, kind: str, scale: float
) -> None:
    """Whoever is chosen scores no worse than an honest one could: it is near some honest one."""
    honest = honest_rows(seed, num)
    rows = with_liars(rule, honest, seed, kind, scale)
    widest = max(float(np.linalg.norm(honest - one, axis=1).max()) for one in honest)
    # Every honest one has n - f - 2 honest others within `widest`, and of those chosen the worst
    # is one of the n - f - 2 best of all; its nearest n - f - 2 include an honest one.
    bound = widest * np.sqrt(len(rows) - rule.num_liars(len(rows)) - 2)
    moved = result(rule, rows).astype(np.float64)
    nearest = np.linalg.norm(honest - moved, axis=1).min()
    assert nearest <= (bound + widest) * (1 + 1e-5)


@pytest.mark.parametrize("rule", ROBUST, ids=rule_name)
def test_one_liar_too_many_breaks_it(rule: Rule) -> None:
    """The stated number is the most: with enough others at one far point the result follows."""
    num = 16
    num_liars = ceil(num / 2) + 1
    rows = honest_rows(1, num)
    rows[:num_liars] = 1e6
    assert np.abs(result(rule, rows)).max() > 1e4


# --- memory ---


@pytest.mark.parametrize(
    "rule",
    [
        TrimmedMean(liar_share=0.2),
        Median(),
        GeometricMedian(),
        Krum(liar_share=0.2),
        MultiKrum(liar_share=0.2),
    ],
    ids=rule_name,
)
def test_memory_does_not_grow_with_the_cohort(rule: Rule, tmp_path: Path) -> None:
    """32 contributions of a million values, 128 MB on the disk, take no more than their blocks."""
    num, num_values, block_bytes = 32, 1_000_000, BLOCK_BYTES // 4
    contributions = []
    for number in range(num):
        file = tmp_path / f"{number}.f32"
        values = np.memmap(file, np.float32, "w+", shape=(num_values,))  # holes take no disk
        values[:: num_values // 16] = number
        contributions.append(VectorContribution(name=file.stem, values=values, weight=1))
    out = np.empty(num_values, np.float32)
    tracemalloc.start()
    combine(rule, contributions, out, block_bytes=block_bytes)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1.25 * block_bytes < num * out.nbytes / 10
    assert 8 < out[0] < 24
    assert out[1] == 0.0
