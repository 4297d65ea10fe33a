"""Domains and objectives."""

import pytest

from minga.training import Maximize, Minimize, choice, loguniform, randint, uniform
from minga.training.errors import TaskError
from minga.training.search.suggestions import draw, grid


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: choice([]), "nothing to choose from"),
        (lambda: uniform(1, 1), r"uniform\(1, 1\) is an empty range"),
        (lambda: randint(5, 2), r"randint\(5, 2\) is an empty range"),
        (lambda: loguniform(0, 1), "must start above 0"),
        (lambda: loguniform(3, 1), r"loguniform\(3, 1\) is an empty range"),
    ],
)
def test_empty_domain_is_refused(make, words):
    """A domain without a value is refused where it is written, with what is wrong."""
    with pytest.raises(TaskError, match=words):
        make()


@pytest.mark.parametrize(
    ("domain", "kind"),
    [
        (choice([1, 2]), int),
        (choice(["a", "b"]), str),
        (choice([True, False]), bool),
        (uniform(0, 1), float),
        (loguniform(0.1, 1), float),
        (randint(0, 5), int),
    ],
)
def test_drawn_values_are_plain(domain, kind):
    """What the search draws are Python's own types, which JSON and other processes take."""
    assert type(draw({"x": domain}, 1, 1)["x"]) is kind
    assert {type(point["x"]) for point in grid({"x": domain}, 3)} == {kind}


def test_gain_is_positive_for_the_better_value():
    """Both directions say by how much the first value is better."""
    assert Maximize("auc").gain(0.9, 0.8) == pytest.approx(0.1)
    assert Minimize("loss").gain(0.8, 0.9) == pytest.approx(0.1)
    assert Minimize("loss").worst > 1e20 > -1e20 > Maximize("auc").worst
