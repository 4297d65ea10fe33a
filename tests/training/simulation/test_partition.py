"""How examples come to virtual devices."""

import numpy as np
import pytest

from minga.training.errors import DataError
from minga.training.simulation.config import (
    ColumnTable,
    DirichletTable,
    EqualTable,
    SourcesTable,
)
from minga.training.simulation.partition import populate
from minga.training.task import Split, Splits
from tests.training.simulation.conftest import reference_to


@pytest.fixture
def task():
    """Three classes, five owners."""
    return reference_to("Dense").load()


@pytest.fixture
def splits(task):
    """Its data."""
    return task.data("1")


@pytest.mark.parametrize(
    "table",
    [
        EqualTable(devices=16),
        EqualTable(devices=16, size_spread=1.0),
        DirichletTable(devices=16, alpha=0.1),
        DirichletTable(devices=16, alpha=0.1, size_spread=1.0),
        ColumnTable(),
    ],
    ids=str,
)
def test_each_example_goes_to_one_device(task, splits, table):
    """Dividing leaves nothing out, gives nothing twice, and gives every device something."""
    population = populate(task, splits, table, seed=5)
    given = np.concatenate(population.train_of)
    assert sorted(given) == list(range(len(splits.train)))
    assert all(len(own) > 0 for own in population.train_of)
    assert len(set(population.names)) == len(population)


def test_smaller_alpha_gives_more_unlike_devices(task, splits):
    """The share of a device's largest class grows as alpha falls; IID is near the whole's."""

    def largest_share(table):
        population = populate(task, splits, table, seed=5)
        targets = [splits.train.targets[own] for own in population.train_of]
        return np.mean([np.bincount(own).max() / len(own) for own in targets])

    shares = [
        largest_share(table)
        for table in (
            EqualTable(devices=12),
            DirichletTable(devices=12, alpha=10.0),
            DirichletTable(devices=12, alpha=0.1),
        )
    ]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0] + 0.3


def test_devices_draw_with_repetition_if_they_are_to(task, splits):
    """With `examples` there may be more devices than the data could be divided among."""
    table = DirichletTable(devices=1000, alpha=0.3, examples=32)
    population = populate(task, splits, table, seed=5)
    assert {len(own) for own in population.train_of} == {32}
    with pytest.raises(DataError, match="240 training examples are too few for 1000 devices"):
        populate(task, splits, DirichletTable(devices=1000), seed=5)


def test_size_spread_makes_devices_unequal(task, splits):
    """Sizes are log-normal: the largest device has several times the median's examples."""
    population = populate(task, splits, EqualTable(devices=20, size_spread=1.0), seed=5)
    sizes = [len(own) for own in population.train_of]
    assert max(sizes) > 2 * np.median(sizes)


def test_same_seed_gives_the_same_devices(task, splits):
    """The seed alone decides who has what."""
    table = DirichletTable(devices=12)
    one, again, other = (populate(task, splits, table, seed=seed) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(one.train_of, again.train_of, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one.train_of, other.train_of, strict=True))


def test_owners_keep_their_examples(task, splits):
    """Each owner is a device, with its own training and validation examples."""
    population = populate(task, splits, ColumnTable(), seed=5)
    assert population.names == tuple(f"owner-{n}" for n in ("ada", "ben", "cem", "dai", "eva"))
    for name, own, measured in zip(
        population.names, population.train_of, population.validation_of, strict=True
    ):
        assert set(splits.train.owners[own]) == {name.removeprefix("owner-")}
        assert set(splits.validation.owners[measured]) == {name.removeprefix("owner-")}


def test_column_of_the_inputs_divides_too(task):
    """A named column's values are the devices."""
    inputs = np.zeros((12, 6))
    inputs[:, 1] = np.arange(12) % 4
    split = Split(inputs=inputs, targets=np.zeros(12, int))
    population = populate(
        task, Splits(train=split, validation=split, test=split), ColumnTable(column="b"), seed=5
    )
    assert population.names == ("b-0.0", "b-1.0", "b-2.0", "b-3.0")
    assert [len(own) for own in population.train_of] == [3, 3, 3, 3]


def test_each_source_is_a_device(task, tmp_path):
    """The Task reads every matching source by itself, as real devices will."""
    for name in ("4", "5", "6"):
        (tmp_path / name).touch()
    population = populate(task, task.data("1"), SourcesTable(pattern="*"), seed=5, root=tmp_path)
    own = task.data("5")
    assert population.names == ("4", "5", "6")
    assert np.array_equal(population.splits_of(1).train.inputs, own.train.inputs)
    assert np.array_equal(population.splits_of(1).validation.targets, own.validation.targets)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (ColumnTable(column="g"), "'g' is no column of the inputs; the Task's columns: a, b"),
        (SourcesTable(pattern="none-*"), "matches 0 sources"),
        (EqualTable(devices=241), "240 training examples are too few"),
    ],
    ids=str,
)
def test_what_cannot_be_divided_is_said(task, splits, tmp_path, table, message):
    """A table that does not fit the data is refused with what to change."""
    with pytest.raises(DataError, match=message):
        populate(task, splits, table, seed=5, root=tmp_path)


def test_numbers_have_no_mix(task):
    """Targets that are measurements cannot be mixed by class."""
    split = Split(inputs=np.zeros((2000, 6)), targets=np.arange(2000.0))
    splits = Splits(train=split, validation=split, test=split)
    with pytest.raises(DataError, match="too many for classes"):
        populate(task, splits, DirichletTable(devices=10), seed=5)
