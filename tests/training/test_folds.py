"""How examples are divided for cross-validation."""

import numpy as np
import pytest

from minga.training import Split, Splits
from minga.training.errors import DataError
from minga.training.selection.folds import development_of, folds_of


class Kind:
    """What a Task says about its examples, and no more."""

    def __init__(self, folds):
        self.folds = folds


def examples(num_rows=200, *, targets=None, owners=None):
    inputs = np.arange(num_rows, dtype=np.float32)[:, None]
    if targets is None:
        targets = np.random.default_rng(0).normal(size=num_rows)
    return Split(inputs=inputs, targets=targets, owners=owners)


@pytest.mark.parametrize("kind", ["shuffled", "grouped", "ordered"])
def test_no_example_has_two_parts(kind):
    """In each fold the examples to learn from, to stop by and to judge by are others."""
    split = examples(owners=np.arange(200) // 5)
    folds = folds_of(Kind(kind), split, num_folds=4, seed=1)
    assert len(folds) == 4
    for fold in folds:
        places = np.concatenate([fold.learn, fold.choose, fold.judge])
        assert len(np.unique(places)) == len(places)
    judged = np.concatenate([fold.judge for fold in folds])
    assert len(judged) == len(np.unique(judged)) == (160 if kind == "ordered" else 200)


def test_owners_stay_together():
    """An owner's examples are learned from, stopped by or judged by, never two of these."""
    owners = np.random.default_rng(0).integers(30, size=200)
    for fold in folds_of(Kind("grouped"), examples(owners=owners), num_folds=5, seed=1):
        parts = [set(owners[one]) for one in (fold.learn, fold.choose, fold.judge)]
        assert len(set.union(*parts)) == sum(map(len, parts))


def test_time_goes_forward():
    """What judges came after what says when to stop, and that after what was learned from."""
    for fold in folds_of(Kind("ordered"), examples(), num_folds=5, seed=1):
        assert fold.learn.max() < fold.choose.min() <= fold.choose.max() < fold.judge.min()


def test_classes_keep_their_shares():
    """A rare class is in every fold, and in its parts."""
    targets = (np.arange(400) % 20 == 0).astype(np.float32)
    for fold in folds_of(Kind("shuffled"), examples(400, targets=targets), num_folds=5, seed=1):
        assert targets[fold.judge].sum() == 4
        assert targets[fold.choose].sum() >= 2


def test_repeats_divide_anew():
    """Each repetition has other folds; the same seed gives the same ones."""
    folds = folds_of(Kind("shuffled"), examples(), num_folds=3, repeats=2, seed=1)
    again = folds_of(Kind("shuffled"), examples(), num_folds=3, repeats=2, seed=1)
    assert len(folds) == 6
    assert not np.array_equal(folds[0].judge, folds[3].judge)
    assert all(np.array_equal(a.judge, b.judge) for a, b in zip(folds, again, strict=True))
    assert folds[0].ratio == pytest.approx(0.5, abs=0.01)


def test_the_test_split_is_not_looked_at():
    """Training and validation examples are joined, with their owners."""
    parts = {name: examples(50, owners=np.full(50, name)) for name in ("train", "validation")}
    found = development_of(Kind("grouped"), Splits(**parts, test=examples(7)))
    assert len(found) == 100
    assert found.owners.tolist() == ["train"] * 50 + ["validation"] * 50


def test_what_is_missing_is_said():
    """Too few examples, and examples without owners where owners count, are refused in words."""
    with pytest.raises(DataError, match="give more examples"):
        folds_of(Kind("shuffled"), examples(20), num_folds=5, seed=1)
    with pytest.raises(DataError, match="cannot be divided into 5 folds"):
        folds_of(Kind("grouped"), examples(owners=np.arange(200) % 3), num_folds=5, seed=1)
    one = examples()
    with pytest.raises(DataError, match="have no owners"):
        development_of(Kind("grouped"), Splits(train=one, validation=one, test=one))
