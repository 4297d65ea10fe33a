"""Statistics of data that stays on its devices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.federation.analytics import (
    BINS,
    QUANTILE_ROUNDS,
    ColumnQuery,
    Part,
    Query,
    Question,
)
from minga.federation.errors import PeerError

LOW, HIGH = -10.0, 30.0
EDGES = (-5.0, 0.0, 7.5, 20.0)
QUANTILES = (0.0, 0.25, 0.5, 0.9, 1.0)
QUERY = Query(
    columns=(
        ColumnQuery(column="a", low=LOW, high=HIGH, edges=EDGES, quantiles=QUANTILES),
        ColumnQuery(column="b", low=0.0, high=1.0),
    )
)
PRECISION = (HIGH - LOW) / BINS**QUANTILE_ROUNDS

Sites = list[dict[str, np.ndarray]]


def ask(query: Query, sites: Sites) -> list[np.ndarray]:
    """Play all rounds with float arithmetic alone."""
    answers: list[np.ndarray] = []
    while (question := query.next_question(answers)) is not None:
        vectors, weights = zip(*(question.answer(site) for site in sites), strict=True)
        answers.append(np.average(np.array(vectors, np.float64), axis=0, weights=weights))
    assert len(answers) == query.num_rounds
    return answers


def whole(sites: Sites, column: str) -> np.ndarray:
    return np.concatenate([site[column] for site in sites])


values = st.floats(LOW, HIGH, width=32) | st.just(float("nan"))
site = st.lists(st.tuples(values, st.floats(0, 1, width=32)), min_size=1, max_size=20).map(
    lambda rows: {"a": np.array([a for a, _ in rows]), "b": np.array([b for _, b in rows])}
)


@settings(max_examples=60)
@given(st.lists(site, min_size=1, max_size=6))
def test_statistics_are_those_of_all_rows(sites: Sites) -> None:
    """Whatever lies where, the result is what numpy says of all rows in one place."""
    rows = whole(sites, "a")
    present = rows[~np.isnan(rows)]
    a, b = QUERY.statistics(ask(QUERY, sites))
    assert b.mean == pytest.approx(whole(sites, "b").mean(), abs=1e-5)
    assert b.variance == pytest.approx(whole(sites, "b").var(), abs=1e-4)
    assert (b.histogram, dict(b.quantiles)) == ((), {})
    assert a.share_present == pytest.approx(len(present) / len(rows), abs=1e-6)
    if not len(present):
        return
    assert a.mean == pytest.approx(present.mean(), abs=1e-3)
    assert a.variance == pytest.approx(present.var(), abs=1e-2)
    counts = np.bincount(np.searchsorted(EDGES, present, side="right"), minlength=len(EDGES) + 1)
    np.testing.assert_allclose(a.histogram, counts / len(present), atol=1e-5)
    for quantile, value in a.quantiles.items():
        # Of a value at a bin's edge half a bin either way belongs to it.
        lower = np.mean(present < value - PRECISION)
        upper = np.mean(present <= value + PRECISION)
        assert lower - 1e-5 <= quantile <= upper + 1e-5


def test_values_out_of_bounds() -> None:
    """A value beyond the bounds counts as the bound in the mean, and outside in a histogram."""
    query = Query(columns=(ColumnQuery(column="a", low=0.0, high=1.0, edges=(0.0, 1.0)),))
    sites = [{"a": np.array([-5.0, 0.5, 0.5, np.inf])}]
    (found,) = query.statistics(ask(query, sites))
    assert found.mean == pytest.approx((0 + 0.5 + 0.5 + 1) / 4)
    assert found.histogram == pytest.approx((0.25, 0.5, 0.25))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"column": ""}, "names of columns"),
        ({"low": 1.0, "high": 1.0}, "bounds"),
        ({"high": float("inf")}, "bounds"),
        ({"edges": (1.0, 1.0)}, "do not rise"),
        ({"edges": (float("nan"),)}, "finite edges"),
        ({"edges": tuple(map(float, range(1025)))}, "up to 1024"),
        ({"quantiles": (1.5,)}, "from 0 to 1"),
    ],
)
def test_impossible_columns(changes: dict[str, object], message: str) -> None:
    """What cannot be found out is refused, on whichever side it is read."""
    with pytest.raises(PeerError, match=message):
        ColumnQuery(**{"column": "a", "low": 0.0, "high": 1.0, **changes})  # type: ignore[arg-type]


def test_impossible_queries() -> None:
    """A query asks something, not too much at once, and each column once."""
    column = ColumnQuery(column="a", low=0.0, high=1.0)
    many = ColumnQuery(column="b", low=0.0, high=1.0, quantiles=(0.5,) * 257)
    for columns, message in (
        ((), "1 to 256"),
        ((column, column), "once"),
        ((many,), "1 to 256 parts"),
    ):
        with pytest.raises(PeerError, match=message):
            Query(columns=columns)
    wide = Part(column="a", low=0.0, high=1.0, edges=tuple(map(float, range(1024))))
    with pytest.raises(PeerError, match="fewer bins"):
        Question(parts=(wide,) * 17)


def test_devices_without_the_data() -> None:
    """A device that lacks a column, or has no rows, says so."""
    question = QUERY.next_question([])
    assert question is not None
    for columns, message in (
        ({"a": np.ones(3)}, "no column 'b'"),
        ({"a": np.ones(3), "b": np.ones(2)}, "not equally many"),
        ({"a": np.ones(0), "b": np.ones(0)}, "no rows"),
    ):
        with pytest.raises(PeerError, match=message):
            question.answer(columns)


def test_all_are_asked_the_same() -> None:
    """Another column, bound or edge gives other masks."""
    questions = [
        Question(parts=(Part(column=c, low=low, high=9.0, edges=edges),))
        for c, low, edges in (("a", 0.0, ()), ("b", 0.0, ()), ("a", 1.0, ()), ("a", 0.0, (1.0,)))
    ]
    assert len({q.subject(b"") for q in questions}) == len(questions)
