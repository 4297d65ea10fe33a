"""What a Task's `data` gives, and the digest that names it."""

import hashlib

import numpy as np

from minga.inference.uris import redacted, scrubbed
from minga.training.errors import DataError
from minga.training.profile import Profile, profile_columns
from minga.training.stored import StoredRows, chunks_of, sample_places
from minga.training.task import Split, SplitName, Splits, Task

SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")


def read_splits(task: Task, source: str) -> Splits:
    """Read a Task's data.

    Raises:
        DataError: the Task cannot read this source, or gives something else than Splits.
    """
    try:
        splits = task.data(source)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{type(task).__name__}.data cannot read {redacted(source)}: "
            f"{type(error).__name__}: {scrubbed(str(error), source)}"
        ) from error
    if not isinstance(splits, Splits):
        raise DataError(
            f"{type(task).__name__}.data gave a {type(splits).__name__}; it must return Splits"
        )
    return splits


def digest_of(splits: Splits) -> str:
    """Name the content of all splits by a SHA-256: types, shapes and every value."""
    digest = hashlib.sha256()
    for name in SPLIT_NAMES:
        for array in (splits[name].inputs, splits[name].targets):
            digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
            for chunk in chunks_of(array):
                digest.update(np.ascontiguousarray(chunk).data)
    return digest.hexdigest()


def sample_of_split(split: Split) -> Split:
    """Give a split as it is, or examples of one that stays on the disk, at equal distances."""
    if not isinstance(split.inputs, StoredRows):
        return split
    places = sample_places(len(split))
    return Split(inputs=split.inputs[places], targets=split.targets[places])


def profile_of(task: Task, train: Split) -> Profile:
    """Profile inputs and targets of a training split."""
    return Profile(
        num_examples=len(train),
        inputs=profile_columns(train.inputs, task.columns),
        targets=profile_columns(train.targets),
    )
