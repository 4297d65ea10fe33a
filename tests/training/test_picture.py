"""The page that shows a search."""

from html.parser import HTMLParser

from minga.training import Maximize, Minimize
from minga.training.search.picture import search_page
from minga.training.trials import SearchResult, Trial


def trial(number, value, **params):
    """A trial of three epochs; one without a value has diverged."""
    history = tuple({"epoch": epoch, "train_loss": 1.0, "m": epoch * value} for epoch in (1, 2, 3))
    return Trial(
        number=number,
        params={"lr": 0.1**number, "hidden": 4 * number, **params},
        metrics={"m": 3 * value} if value else {},
        epochs=3,
        status="finished" if value else "diverged",
        history=history if value else (),
    )


def page_of(trials, objective):
    """The page of a search whose best trial is the first."""
    best = trials[0]
    found = SearchResult(params=best.params, metrics=best.metrics, trials=trials, resumed=False)
    return search_page(found, objective, title="blobs: search")


class Marks(HTMLParser):
    """Collects the elements of a page."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def of(self, kind, number):
        """Give a trial's marks of one kind."""
        return [a for tag, a in self.found if tag == kind and a.get("data-trial") == str(number)]


def test_every_trial_is_in_every_drawing():
    """A trial has a line, a point, a curve and a row; a diverged one has no value to draw."""
    marks = Marks(page_of((trial(1, 0.3), trial(2, 0.2), trial(3, 0)), Maximize("m")))
    assert [len(marks.of("polyline", n)) for n in (1, 2, 3)] == [2, 2, 1]
    assert [len(marks.of("circle", n)) for n in (1, 2, 3)] == [1, 1, 0]
    assert [len(marks.of("tr", n)) for n in (1, 2, 3)] == [1, 1, 1]


def test_the_page_needs_nothing_else_and_trusts_nobody():
    """No mark points elsewhere, and what a Task calls things is no code."""
    evil = "<script>alert(1)</script>"
    page = page_of((trial(1, 0.3, kind=evil), trial(2, 0.2, kind="b")), Minimize("m"))
    marks = Marks(page)
    assert evil not in page
    assert [tag for tag, _ in marks.found].count("script") == 1
    assert not [name for _, attrs in marks.found for name in attrs if name in ("src", "href")]


def test_one_trial_is_a_picture_too():
    """A search of one trial, or one in which all values are equal, is drawn."""
    assert "1 finished" in page_of((trial(1, 0.3),), Maximize("m"))
    assert "2 finished" in page_of((trial(1, 0.3), trial(2, 0.3)), Maximize("m"))
