"""The course of a search, without Ray: cuts, suggestions, populations, budgets, interruptions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.training import Maximize, Minimize, choice, loguniform, randint, uniform
from minga.training.config import SearchConfig
from minga.training.errors import TaskError
from minga.training.search.course import Course, Pause
from minga.training.search.halving import Halving
from minga.training.search.ledger import Ledger
from minga.training.search.population import Member, next_generation
from minga.training.search.suggestions import Known, contains, draw, grid, parse, tpe

SPACE = {
    "lr": loguniform(1e-4, 1e-1),
    "momentum": uniform(0, 1),
    "hidden": choice([4, 8, 16]),
    "depth": randint(1, 4),
}


def halving(**changes):
    """The rule with rungs at 1, 2 and 4 epochs of 8."""
    settings = {"grace_epochs": 1, "reduction_factor": 2, "max_epochs": 8}
    return Halving(objective=Maximize("m"), **(settings | changes))


def by_turns(rule, curves, order):
    """Run trials whose epochs end in any order, each stopped when it is known to be cut."""
    values = {number: [] for number in curves}
    ended = set()
    for number in order:
        if number in ended:
            continue
        values[number].append(curves[number][len(values[number])])
        if number in rule.cuts(values, ended) or len(values[number]) == rule.max_epochs:
            ended.add(number)
    return rule.cuts(values, ended), ended


@given(st.data())
def test_cuts_do_not_depend_on_who_is_faster(data):
    """Any interleaving of any number of trials cuts those that one at a time would."""
    rule = halving(reduction_factor=data.draw(st.sampled_from([2, 3])))
    numbers = range(1, data.draw(st.integers(2, 7)) + 1)
    value = st.one_of(st.floats(0, 1), st.just(float("nan")))
    curves = {n: data.draw(st.lists(value, min_size=8, max_size=8)) for n in numbers}
    one_by_one, _ = by_turns(rule, curves, [n for n in numbers for _ in range(8)])
    turns = data.draw(st.permutations([n for n in numbers for _ in range(8)]))
    mixed, ended = by_turns(rule, curves, turns)
    assert ended == set(numbers)
    assert mixed == one_by_one


def test_worse_half_is_cut_at_each_rung():
    """A trial goes on while it is among the better half of those before it."""
    values = {1: [0.5] * 8, 2: [0.4], 3: [0.6] * 8, 4: [0.7, 0.1]}
    assert halving().cuts(values, {1, 2, 3, 4}) == {2: 1, 4: 2}
    assert halving(grace_epochs=8).cuts(values, {1, 2, 3, 4}) == {}


def test_random_points_depend_on_the_seed_and_the_number_alone():
    """The same number draws the same point, within its domains; others draw others."""
    points = [draw(SPACE, 7, number) for number in range(1, 50)]
    assert points[4] == draw(SPACE, 7, 5)
    assert len({str(point) for point in points}) == 49
    assert all(contains(SPACE[name], point[name]) for point in points for name in SPACE)
    assert {point["hidden"] for point in points} == {4, 8, 16}
    assert {point["depth"] for point in points} == {1, 2, 3}
    assert np.median([point["lr"] for point in points]) < 1e-2


def test_a_grid_has_every_combination():
    """Choices give all their options, ranges as many values as asked, by ratios if logarithmic."""
    points = grid(SPACE, 3)
    assert len(points) == len({str(point) for point in points}) == 3 * 3 * 3 * 3
    rates = sorted({point["lr"] for point in points})
    np.testing.assert_allclose(rates, [1e-4, 10**-2.5, 1e-1])


@pytest.mark.parametrize("objective", [Maximize("m"), Minimize("m")])
def test_tpe_learns_where_good_points_are(objective):
    """TPE's later points are far better than random ones, and they repeat."""
    space = {"x": uniform(0, 1), "kind": choice(["a", "b"])}
    sign = -1 if objective.mode == "max" else 1

    def loss(point):
        return sign * (abs(point["x"] - 0.3) + (point["kind"] == "b"))

    known = []
    for number in range(40):
        point = tpe(space, objective, number, known, 40)
        assert point == tpe(space, objective, number, known, 40)
        known.append(Known(params=point, value=loss(point)))
    late = np.median([abs(loss(trial.params)) for trial in known[-15:]])
    by_chance = np.median([abs(loss(draw(space, 1, number))) for number in range(1000)])
    assert late < by_chance / 3


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("hidden", "8", 8),
        ("hidden", "9", None),
        ("lr", "0.01", 0.01),
        ("lr", "2.0", None),
        ("lr", "fast", None),
        ("depth", "4", None),
        ("depth", "3", 3),
    ],
)
def test_values_come_back_from_text(name, text, value):
    """What MLflow keeps as text is a value again, if it lies in today's space."""
    assert parse(SPACE[name], text) == value


def test_the_weak_take_over_from_the_strong():
    """The weakest quarter gets the strongest's weights and a change; shapes stay what they are."""
    members = [Member(number=n, source=n, params=draw(SPACE, 1, n)) for n in range(1, 9)]
    values = {n: n / 10 for n in range(2, 9)}  # the first has failed
    after = next_generation(
        members, values, space=SPACE, objective=Maximize("m"), seed=3, generation=1
    )
    assert [member.number for member in after] == list(range(1, 9))
    assert [member.source in (7, 8) for member in after[:2]] == [True, True]
    assert [member.source for member in after[2:]] == [3, 4, 5, 6, 7, 8]
    source = members[after[0].source - 1].params
    assert after[0].params["hidden"] == source["hidden"]
    assert after[0].params["lr"] != source["lr"]
    assert all(contains(SPACE[name], m.params[name]) for m in after for name in SPACE)


@pytest.fixture
def course(blobs, tmp_path):
    """Makes the course of a search in one folder, as a new process would."""

    def make(**settings):
        settings = {"num_trials": 4, "max_epochs": 4, "scheduler": "none"} | settings
        return Course(blobs, SearchConfig(**settings), 7, Ledger(tmp_path / "search"))

    return make


def play(course, value=lambda entry, epoch: 0.5, *, epochs=99):
    """Let trials run one by one until nothing begins any more, or so many epochs have passed."""
    while not isinstance(entry := course.next(), Pause):
        for epoch in range(len(entry.history) + 1, course.until(entry) + 1):
            epochs -= 1
            if epochs < 0:
                return
            if course.note(entry, {"epoch": epoch, "accuracy": value(entry, epoch)}):
                break
        course.end(entry)


@pytest.mark.parametrize("scheduler", ["none", "halving", "population"])
@pytest.mark.parametrize("epochs", [1, 4, 6, 11])
def test_a_course_goes_on_from_its_ledger(blobs, tmp_path, scheduler, epochs):
    """Killed after any epoch, a search ends as an undisturbed one, without repeating one."""

    def make(folder):
        config = SearchConfig(num_trials=4, max_epochs=4, scheduler=scheduler)
        return Course(blobs, config, 7, Ledger(tmp_path / folder))

    def value(entry, epoch):
        taken.append((entry.generation, entry.number, epoch))
        return (entry.params["lr"] * 1e4 % 1) + epoch / 10

    taken = []
    whole = make("whole")
    play(whole, value)
    quiet, taken = taken, []
    play(make("killed"), value, epochs=epochs)
    assert not make("killed").is_complete
    rest = make("killed")
    play(rest, value)
    assert rest.resumed
    assert rest.is_complete
    assert rest.trials() == whole.trials()
    assert taken == quiet


def test_population_hands_weights_on(course):
    """A generation begins when the one before has ended; its members have their source's past."""
    course = course(scheduler="population", perturbation_epochs=2)
    play(course, lambda entry, epoch: entry.number / 10)
    second = [entry for key, entry in course.entries.items() if key[0] == 1]
    assert [entry.source for entry in second] == [4, 2, 3, 4]
    assert [record["epoch"] for record in second[0].history] == [1, 2, 3, 4]
    assert second[0].history[0]["accuracy"] == 0.4
    assert [trial.status for trial in course.trials()] == ["finished"] * 4


def test_time_runs_out(course):
    """Past its budget, over interruptions too, a search begins nothing and stops what runs."""
    first = course(budget_s=1000.0)
    entry = first.next()
    assert not first.note(entry, {"epoch": 1, "accuracy": 0.5})
    first.ledger.seconds = 2000.0
    late = course(budget_s=1000.0)
    assert late.is_complete
    assert [(trial.status, trial.epochs) for trial in late.trials()] == [("cut", 1)]


def test_patience_of_a_search(course):
    """A search ends when trials in a row gained nothing."""
    course = course(num_trials=50, patience=3)
    play(course, lambda entry, epoch: 0.9 if entry.number == 2 else 0.5)
    assert course.is_complete
    assert len(course.trials()) == 5


def test_a_failed_trial_gets_another_try(course):
    """What failed is tried again when the search goes on, and is an end otherwise."""
    first = course(num_trials=1)
    first.end(first.next(), failed=True)
    assert first.is_complete
    assert [trial.status for trial in first.trials()] == ["failed"]
    again = course(num_trials=1)
    assert not again.is_complete
    play(again)
    assert [trial.status for trial in again.trials()] == ["finished"]


def test_a_grid_must_fit_the_number_of_trials(course):
    """A grid that would be cut off is refused, with how large it is."""
    with pytest.raises(TaskError, match="the grid has 9 points but"):
        course(searcher="grid")
    assert len(grid(course(num_trials=9).task.search_space, 3)) == 9
