"""Checks of data before it is used, and the digest that names it.

Errors stop a run: shapes, types, emptiness, missing values, unknown categories in training data.
Warnings do not: ranges, drift, examples of the test split that were also learned from.
"""

import hashlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minga.training.config import DataConfig
from minga.training.document import Document
from minga.training.errors import DataError
from minga.training.profile import Profile, profile_columns, stability_index
from minga.training.schema import Column, Schema, iterate_columns
from minga.training.task import Split, SplitName, Splits, Task

SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")

MAX_OVERLAP = 0.05
"""Share of test examples that may also be training examples: readings do repeat."""


class Violation(Document):
    """One thing that is wrong with a split."""

    severity: Literal["error", "warning"]
    kind: Literal["empty", "shape", "type", "missing", "category", "range", "drift", "overlap"]
    split: SplitName
    column: str = ""
    seen: str
    goal: str

    def __str__(self) -> str:
        where = f"{self.split}.{self.column}" if self.column else self.split
        return f"{where}: {self.kind} is {self.seen}, should be {self.goal}"


class DataReport(Document):
    """What data was found, what it should look like, and where it does not."""

    task: str
    source: str
    digest: str
    num_examples: dict[SplitName, int]
    data_schema: Schema
    profile: Profile
    violations: tuple[Violation, ...]
    reference: str
    """What the data was checked against: "itself" or the name of a registered version."""

    @property
    def errors(self) -> tuple[Violation, ...]:
        """The violations that stop a run."""
        return tuple(found for found in self.violations if found.severity == "error")

    def require_valid(self) -> None:
        """Refuse data with errors.

        Raises:
            DataError: with the first of them.
        """
        if self.errors:
            more = f" ({len(self.errors) - 1} more)" if len(self.errors) > 1 else ""
            raise DataError(
                f"{self.source}: {self.errors[0]}{more}; see all with: minga data check"
            )


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
            f"{type(task).__name__}.data cannot read {source}: {type(error).__name__}: {error}"
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
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def profile_of(task: Task, train: Split) -> Profile:
    """Profile inputs and targets of a training split."""
    return Profile(
        num_examples=len(train),
        inputs=profile_columns(train.inputs, task.columns),
        targets=profile_columns(train.targets),
    )


def check(
    splits: Splits, schema: Schema, profile: Profile, config: DataConfig
) -> tuple[Violation, ...]:
    """Check every split against a schema and a profile, those of its own training split or others.

    A split of the wrong shape is not looked at any further.
    """
    found: list[Violation] = []
    for name in SPLIT_NAMES:
        layout = tuple(_check_layout(name, splits[name], schema))
        found += layout or _check_columns(name, splits[name], schema, profile, config)
    if not found or all(violation.kind not in ("shape", "empty") for violation in found):
        found += _check_overlap(splits)
    return tuple(found)


def _check_layout(name: SplitName, split: Split, schema: Schema) -> Iterator[Violation]:
    if len(split) == 0:
        yield Violation(severity="error", kind="empty", split=name, seen="0 rows", goal="1 or more")
        return
    expected: tuple[tuple[str, NDArray[Any], tuple[int, ...], str], ...] = (
        ("inputs", split.inputs, schema.input_shape, schema.input_dtype),
        ("targets", split.targets, schema.target_shape, schema.target_dtype),
    )
    for part, array, shape, dtype in expected:
        if array.shape[1:] != shape:
            yield Violation(
                severity="error",
                kind="shape",
                split=name,
                column=part,
                seen=str(array.shape[1:]),
                goal=str(shape),
            )
        elif str(array.dtype) != dtype:
            yield Violation(
                severity="error",
                kind="type",
                split=name,
                column=part,
                seen=str(array.dtype),
                goal=dtype,
            )


def _check_columns(
    name: SplitName, split: Split, schema: Schema, profile: Profile, config: DataConfig
) -> Iterator[Violation]:
    names = tuple(column.name for column in schema.columns)
    references = zip(schema.columns, profile.inputs, strict=True)
    for (column, reference), (_, values) in zip(
        references, iterate_columns(split.inputs, names), strict=True
    ):
        yield from _check_values(name, column, values, config)
        drift = stability_index(reference, values)
        if drift > config.max_drift:
            yield Violation(
                severity="warning",
                kind="drift",
                split=name,
                column=column.name,
                seen=f"{drift:.3f}",
                goal=f"<= {config.max_drift}",
            )


def _check_values(
    name: SplitName, column: Column, values: NDArray[np.float64], config: DataConfig
) -> Iterator[Violation]:
    present = values[np.isfinite(values)]
    missing = 1 - len(present) / len(values)
    if missing > max(config.max_missing, column.missing):
        yield Violation(
            severity="error",
            kind="missing",
            split=name,
            column=column.name,
            seen=f"{missing:.2%}",
            goal=f"<= {max(config.max_missing, column.missing):.2%}",
        )
    if column.kind == "category":
        unknown = np.setdiff1d(present, column.categories)
        if len(unknown):
            yield Violation(
                severity="error" if name == "train" else "warning",
                kind="category",
                split=name,
                column=column.name,
                seen=", ".join(f"{value:g}" for value in unknown[:5]),
                goal="one of " + ", ".join(f"{value:g}" for value in column.categories),
            )
        return
    outside = (
        float(np.mean((present < column.low) | (present > column.high))) if len(present) else 0
    )
    if outside > config.max_out_of_range:
        yield Violation(
            severity="warning",
            kind="range",
            split=name,
            column=column.name,
            seen=f"{outside:.2%} outside {column.low:g} .. {column.high:g}",
            goal=f"<= {config.max_out_of_range:.2%}",
        )


def _check_overlap(splits: Splits) -> Iterator[Violation]:
    known = set(_rows(splits.train.inputs))
    test = _rows(splits.test.inputs)
    overlap = sum(row in known for row in test) / len(test)
    if overlap > MAX_OVERLAP:
        yield Violation(
            severity="warning",
            kind="overlap",
            split="test",
            seen=f"{overlap:.1%} of it in train",
            goal=f"<= {MAX_OVERLAP:.0%}",
        )


def _rows(inputs: NDArray[Any]) -> list[bytes]:
    """Name each example by a digest of 16 bytes, so that images do not fill the memory."""
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in inputs]
