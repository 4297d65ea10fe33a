"""Rules against other implementations and by hand, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
from flwr.server.strategy import aggregate as flower
from scipy import optimize, stats

from minga.federation.aggregation.combination import combine
from minga.federation.aggregation.contributions import (
    FileContribution,
    VectorContribution,
)
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
from minga.federation.errors import RuleError
from minga.federation.memory import BLOCK_VALUES

from .rule_cases import RULES, combined, contributions_of, result, rule_name

ROWS = np.random.default_rng(4).normal(size=(11, 300)).astype(np.float32)
FLOWERS = [([row], 1) for row in ROWS]
"""The same as Flower takes them: lists of layers, with example counts."""


# --- against other implementations ---


def test_files_are_read_as_arrays_are(tmp_path: Path) -> None:
    """An update that lies in a file counts as one in memory, also beyond one block."""
    rows = np.random.default_rng(5).normal(size=(3, BLOCK_VALUES + 5)).astype(np.float32)
    files = []
    for number, row in enumerate(rows):
        path = tmp_path / str(number)
        row.astype("<f4").tofile(path)
        files.append(
            FileContribution(name=path.name, path=path, num_values=row.size, weight=number + 1)
        )
    out = np.empty(rows.shape[1], np.float32)
    for rule in (Mean(), Median()):
        combine(rule, files, out)
        np.testing.assert_array_equal(out, result(rule, rows, [1, 2, 3]))


def test_mean_is_flowers() -> None:
    """The weighted mean agrees with Flower's."""
    weights = list(range(1, 12))
    (theirs,) = flower.aggregate([([row], n) for row, n in zip(ROWS, weights, strict=True)])
    np.testing.assert_allclose(result(Mean(), ROWS, weights), theirs, atol=1e-6)


@pytest.mark.parametrize("num", [10, 11])
def test_median_is_flowers(num: int) -> None:
    """The median agrees with Flower's, for odd and even numbers."""
    (theirs,) = flower.aggregate_median(FLOWERS[:num])
    np.testing.assert_allclose(result(Median(), ROWS[:num]), theirs, atol=1e-7)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.45])
def test_trimmed_mean_is_scipys_and_flowers(share: float) -> None:
    """The trimmed mean agrees with that of SciPy, from which Flower's is taken."""
    ours = result(TrimmedMean(liar_share=share), ROWS)
    np.testing.assert_allclose(ours, stats.trim_mean(ROWS, share, axis=0), atol=1e-6)
    (theirs,) = flower.aggregate_trimmed_avg(FLOWERS, share)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("share", "num_liars"), [(0.1, 1), (0.2, 2), (0.28, 3), (0.37, 4)])
def test_krum_is_flowers(share: float, num_liars: int) -> None:
    """Krum chooses the same one as Flower's, bit by bit; so does multi-Krum choose the same."""
    rows = ROWS * np.linspace(0.5, 2.0, 11, dtype=np.float32)[:, None]
    flowers = [([row], 1) for row in rows]
    (one,) = flower.aggregate_krum(flowers, num_liars, 0)
    np.testing.assert_array_equal(result(Krum(liar_share=share), rows), one)
    (many,) = flower.aggregate_krum(flowers, num_liars, 11 - num_liars - 2)
    np.testing.assert_allclose(result(MultiKrum(liar_share=share), rows), many, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_geometric_median_is_the_minimum(seed: int) -> None:
    """No optimiser finds a point with a smaller sum of distances."""
    rows = np.random.default_rng(seed).standard_t(2, size=(9, 4)).astype(np.float32).astype(float)

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(rows - point, axis=1).sum())

    ours = result(GeometricMedian(), rows)
    for method in ("Nelder-Mead", "Powell", "BFGS"):
        found = optimize.minimize(total, rows.mean(axis=0), method=method, tol=1e-12)
        assert total(ours) <= found.fun * (1 + 1e-12)
        np.testing.assert_allclose(ours, found.x, atol=1e-4)


# --- by hand ---


def test_geometric_median_of_a_triangle_is_fermats_point() -> None:
    """All sides are seen under 120 degrees from the point where distances add up to least."""
    corners = np.array([[0, 0], [4, 0], [1, 3]], np.float32)
    point = result(GeometricMedian(), corners).astype(np.float64)
    rays = (corners - point) / np.linalg.norm(corners - point, axis=1)[:, None]
    angles = np.degrees(np.arccos([rays[0] @ rays[1], rays[1] @ rays[2], rays[2] @ rays[0]]))
    np.testing.assert_allclose(angles, 120, atol=1e-3)


def test_geometric_median_at_a_vector() -> None:
    """Where one corner sees the others under more than 120 degrees, it is the median itself."""
    corners = np.array([[0, 0], [4, 0.5], [-4, 0.5]], np.float32)
    np.testing.assert_allclose(result(GeometricMedian(), corners), [0, 0], atol=1e-6)


def test_geometric_median_with_doubles() -> None:
    """A point that more than half agree on is the median, wherever the others are."""
    rows = np.array([[1, 2], [1, 2], [1, 2], [50, 0], [0, 90]], np.float32)
    np.testing.assert_allclose(result(GeometricMedian(), rows), [1, 2], atol=1e-6)


def test_krum_by_hand() -> None:
    """Of 0, 1, 3, 10, 11 with one liar, 1 has the two nearest nearest: 1 + 4."""
    rows = np.array([[0], [1], [3], [10], [11]], np.float32)
    assert result(Krum(liar_share=0.2), rows) == [1]
    # scores 10, 5, 13, 50, 65: the best two are 1 and 0
    assert result(MultiKrum(liar_share=0.2), rows) == [0.5]


def test_trimmed_mean_and_median_by_hand() -> None:
    """One of five is cut at each end; the middle of an even number is between two."""
    rows = np.array([[7], [-100], [1], [100], [4]], np.float32)
    assert result(TrimmedMean(liar_share=0.2), rows) == [4]
    assert result(Median(), rows) == [4]
    assert result(Median(), rows[:4]) == [4]


def test_clipping_by_hand() -> None:
    """What is longer than the bound is shortened to it; its direction stays."""
    rows = np.array([[3, 4], [0.3, 0.4], [0, -6]], np.float32)
    mean, told = combined(Mean(clip=Clip(max_norm=1.0)), rows)
    np.testing.assert_allclose(mean, [(0.6 + 0.3) / 3, (0.8 + 0.4 - 1) / 3], rtol=1e-6)
    assert told.clipped == ("d0", "d2")
    median, told = combined(Median(clip=Clip(max_norm=1.0)), rows)
    np.testing.assert_allclose(median, [0.3, 0.4], rtol=1e-6)
    mean, told = combined(Mean(clip=Clip()), rows)  # the median length is 5
    np.testing.assert_allclose(mean, [3.3 / 3, (4.4 - 5) / 3], rtol=1e-6)
    assert told.clipped == ("d2",)


def test_krum_measures_distances_after_clipping() -> None:
    """The distances are those of the shortened contributions: ten times the same is one point."""
    rows = np.array([[1, 0], [10, 0], [100, 0], [0, 1], [0.8, -0.6]], np.float32)
    chosen = result(Krum(liar_share=0.2, clip=Clip(max_norm=1.0)), rows)
    np.testing.assert_allclose(chosen, [1, 0])


def test_clipping_leaves_nothing_as_it_is() -> None:
    """Updates of zero stay zero, though the median length is zero too."""
    rows = np.zeros((3, 2), np.float32)
    rows[0] = 5.0
    np.testing.assert_array_equal(result(Mean(clip=Clip()), rows), 0.0)


def test_mean_by_head() -> None:
    """Without weights each contribution counts once, whatever it says of itself."""
    rows = np.array([[0.0], [3.0]], np.float32)
    assert result(Mean(is_weighted=False), rows, [1, 1000]) == [1.5]
    assert result(Mean(), rows, [1, 2]) == [2.0]


@pytest.mark.parametrize("rule", RULES[1:], ids=rule_name)
def test_weights_buy_no_votes(rule: Rule) -> None:
    """No rule for untrusted fleets goes by weights, which are what a sender says of itself."""
    weights = [1, 1, 10_000, 1, 1, 5, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(result(rule, ROWS, weights), result(rule, ROWS))


# --- what is left out, and what is refused ---


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_left_out_by_name(rule: Rule, poison: float) -> None:
    """Who sends NaN or infinity is named, and the result is that of the others."""
    rows = ROWS.copy()
    rows[3, -1] = poison
    mean, told = combined(rule, rows)
    assert told.rejected == {"d3": "it holds NaN or infinity"}
    assert told.counted == tuple(f"d{n}" for n in range(11) if n != 3)
    assert told.total_weight == 10
    np.testing.assert_allclose(mean, result(rule, np.delete(rows, 3, axis=0)), atol=1e-7)


def test_late_poison_in_small_blocks() -> None:
    """A contribution whose last block holds NaN leaves no trace of its first ones."""
    rows = np.ones((6, 40), np.float32)
    rows[5], rows[5, 39] = 1e30, np.nan
    out = np.empty(40, np.float32)
    told = combine(GeometricMedian(), contributions_of(rows), out, block_bytes=16 * 6)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)
    assert tuple(told.rejected) == ("d5",)


def test_what_does_not_fit_is_left_out_by_name() -> None:
    """Another length and an impossible weight are named with both numbers."""
    good = contributions_of(np.ones((3, 2), np.float32))
    short = VectorContribution(name="short", values=np.ones(1, np.float32), weight=1)
    void = VectorContribution(name="void", values=np.ones(2, np.float32), weight=0)
    out = np.empty(2, np.float32)
    told = combine(Mean(), [short, *good, void], out)
    assert told.rejected == {
        "short": "it has 1 values, the model 2",
        "void": "its weight is 0; it must be 1 or more",
    }
    np.testing.assert_array_equal(out, 1.0)


@pytest.mark.parametrize(
    ("rule", "num", "words"),
    [
        (Mean(), 0, "0 sound contributions are too few for Mean; it needs 1"),
        (Median(), 2, "2 sound contributions are too few for Median; it needs 3"),
        (GeometricMedian(), 2, "GeometricMedian; it needs 3"),
        (TrimmedMean(liar_share=0.2), 4, "TrimmedMean; it needs 5"),
        (TrimmedMean(liar_share=0.29), 3, "it needs 4"),
        (Krum(liar_share=0.2), 4, "Krum; it needs 5"),
        (Krum(liar_share=0.4), 5, "Krum; it needs 7"),
        (MultiKrum(liar_share=0.45), 9, "MultiKrum; it needs 11"),
    ],
)
def test_too_few_for_the_rule(rule: Rule, num: int, words: str) -> None:
    """A rule that could not keep its promise refuses, and says how many it needs."""
    with pytest.raises(RuleError, match=re.escape(words)):
        result(rule, np.zeros((num, 2), np.float32))


def test_too_few_after_the_poisoned_are_left_out() -> None:
    """What was left out does not count towards the number that a rule needs."""
    rows = np.zeros((3, 2), np.float32)
    rows[0, 0] = np.nan
    with pytest.raises(RuleError, match="2 sound contributions are too few"):
        result(Median(), rows)


@pytest.mark.parametrize("share", [0.0, 0.5, -0.1, np.nan])
@pytest.mark.parametrize("kind", [TrimmedMean, Krum, MultiKrum])
def test_impossible_share_of_liars(kind: type[Rule], share: float) -> None:
    """Liars are more than none and fewer than half."""
    with pytest.raises(ValueError, match=r"liar_share is .*; it must be between 0\.001 and 0\.5"):
        kind(liar_share=share)


@pytest.mark.parametrize("bound", [0.0, -1.0, np.inf, np.nan])
def test_impossible_bound(bound: float) -> None:
    """A bound on lengths is above zero and finite."""
    with pytest.raises(ValueError, match=r"max_norm is .*; it must be above 0"):
        Clip(max_norm=bound)
