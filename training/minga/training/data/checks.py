"""Checks of data before it is used.

Errors stop a run: shapes, types, emptiness, missing values, unknown categories in training data.
Warnings do not, unless `[data] strict` is set: ranges, drift, volume, values that should be unique,
examples that are in two splits, a column that gives the target away.
"""

import hashlib
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minga.training.config import DataConfig
from minga.training.document import Document
from minga.training.errors import SchemaError
from minga.training.profile import ColumnProfile, Profile, stability_index
from minga.training.schema import Column, Schema, iterate_columns
from minga.training.task import Split, SplitName, Splits

MAX_OVERLAP = 0.05
"""Share of test examples that may also be training examples: readings do repeat."""

MAX_CORRELATION = 0.999
"""A column that follows the target more closely than this is the target under another name."""

MISSING_DEVIATIONS = 4
"""How many standard deviations the share of missing values may lie above the reference's."""

NAMED_CATEGORIES = 5
"""How many unknown categories a message names."""

Severity = Literal["error", "warning"]
Kind = Literal[
    "empty",
    "shape",
    "type",
    "missing",
    "category",
    "range",
    "duplicate",
    "volume",
    "drift",
    "overlap",
    "leak",
]


class Violation(Document):
    """One thing that is wrong with a split."""

    severity: Severity
    kind: Kind
    path: str
    """`split` or `split.column`, such as `test.torque`; targets are `split.targets`."""
    expected: str
    seen: str
    count: int
    """How many examples it concerns."""

    def __str__(self) -> str:
        return f"{self.path}: {self.kind} is {self.seen}, should be {self.expected}"


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
    """What the data was checked against: "itself", the kept schema, a registered version."""

    @property
    def errors(self) -> tuple[Violation, ...]:
        """The violations that stop a run."""
        return tuple(found for found in self.violations if found.severity == "error")

    def require_valid(self) -> None:
        """Refuse data with errors.

        Raises:
            SchemaError: with the first of them.
        """
        require_none(self.source, self.errors, "see all with: minga data check")


def require_none(source: str, errors: tuple[Violation, ...], remedy: str) -> None:
    """Refuse data with errors.

    Raises:
        SchemaError: with the first of them.
    """
    if errors:
        more = f" ({len(errors) - 1} more)" if len(errors) > 1 else ""
        raise SchemaError(f"{source}: {errors[0]}{more}; {remedy}")


def check(
    splits: Splits, schema: Schema, profile: Profile | None, config: DataConfig
) -> tuple[Violation, ...]:
    """Check every split against a schema and a profile, those of its own training split or others.

    A split of the wrong shape is not looked at any further.

    Args:
        splits: what is checked.
        schema: what it should look like.
        profile: what drift and volume are measured against; without one they are not.
        config: how far data may stray.
    """
    found: list[Violation] = []
    names: tuple[SplitName, ...] = ("train", "validation", "test")
    for name in names:
        layout = tuple(_check_layout(name, splits[name], schema))
        found += layout or _check_columns(name, splits[name], schema, profile, config)
    if profile is not None:
        found += _check_volume(splits.train, profile, config)
    if all(violation.kind not in ("shape", "empty") for violation in found):
        found += _check_overlap(splits)
        found += _check_leaks(splits.train, schema)
    if config.strict:
        return tuple(item.model_copy(update={"severity": "error"}) for item in found)
    return tuple(found)


def _check_layout(name: SplitName, split: Split, schema: Schema) -> Iterator[Violation]:
    if len(split) == 0:
        yield _error("empty", name, expected="1 row or more", seen="0 rows", count=0)
        return
    expected: tuple[tuple[str, NDArray[Any], tuple[int, ...], str], ...] = (
        ("inputs", split.inputs, schema.input_shape, schema.input_dtype),
        ("targets", split.targets, schema.target_shape, schema.target_dtype),
    )
    for part, array, shape, dtype in expected:
        path = f"{name}.{part}"
        if array.shape[1:] != shape:
            yield _error(
                "shape", path, expected=str(shape), seen=str(array.shape[1:]), count=len(split)
            )
        elif str(array.dtype) != dtype:
            yield _error("type", path, expected=dtype, seen=str(array.dtype), count=len(split))


def _check_columns(
    name: SplitName, split: Split, schema: Schema, profile: Profile | None, config: DataConfig
) -> Iterator[Violation]:
    names = tuple(column.name for column in schema.columns)
    references = {column.name: column for column in profile.inputs} if profile else {}
    columns = zip(schema.columns, iterate_columns(split.inputs, names), strict=True)
    for column, (_, values) in columns:
        yield from _check_values(name, f"{name}.{column.name}", column, values, config)
        yield from _check_drift(
            f"{name}.{column.name}", references.get(column.name), values, config
        )
    if schema.targets:
        table = split.targets[:, None] if split.targets.ndim == 1 else split.targets
        for column, (_, values) in zip(schema.targets, iterate_columns(table), strict=True):
            yield from _check_values(name, f"{name}.targets", column, values, config)


def _check_values(
    name: SplitName, path: str, column: Column, values: NDArray[np.float64], config: DataConfig
) -> Iterator[Violation]:
    present = values[np.isfinite(values)]
    yield from _check_missing(path, column, len(values), len(values) - len(present), config)
    if column.kind == "category":
        is_unknown = ~np.isin(present, column.categories)
        if is_unknown.any():
            kind = _error if name == "train" else _warning
            yield kind(
                "category",
                path,
                expected="one of " + ", ".join(column.named(value) for value in column.categories),
                seen=_first_few(np.unique(present[is_unknown])),
                count=int(is_unknown.sum()),
            )
        return
    outside = int(((present < column.low) | (present > column.high)).sum())
    if outside > config.max_out_of_range * len(present):
        share = outside / len(present)
        yield _warning(
            "range",
            path,
            expected=f"{column.low:g} .. {column.high:g}",
            seen=f"{present.min():g} .. {present.max():g}, {share:.2%} outside",
            count=outside,
        )
    fractions = int((present != np.round(present)).sum()) if column.whole else 0
    if fractions:
        yield _warning(
            "type", path, expected="whole numbers", seen="fractions too", count=fractions
        )
    repeated = len(present) - len(np.unique(present)) if column.unique else 0
    if repeated:
        yield _warning(
            "duplicate", path, expected="each value once", seen="values repeat", count=repeated
        )


def _check_missing(
    path: str, column: Column, num_values: int, num_missing: int, config: DataConfig
) -> Iterator[Violation]:
    """A column with holes in the reference may have as many again, by the luck of the draw."""
    luck = math.sqrt(column.missing * (1 - column.missing) / num_values)
    allowed = max(config.max_missing, column.missing + MISSING_DEVIATIONS * luck)
    if num_missing > allowed * num_values:
        yield _error(
            "missing",
            path,
            expected=f"<= {allowed:.2%}",
            seen=f"{num_missing / num_values:.2%}",
            count=num_missing,
        )


def _check_drift(
    path: str, reference: ColumnProfile | None, values: NDArray[np.float64], config: DataConfig
) -> Iterator[Violation]:
    drift = stability_index(reference, values) if reference else 0.0
    if drift > config.max_drift:
        yield _warning(
            "drift",
            path,
            expected=f"<= {config.max_drift}",
            seen=f"{drift:.3f}",
            count=len(values),
        )


def _check_volume(train: Split, profile: Profile, config: DataConfig) -> Iterator[Violation]:
    least = math.ceil(config.min_volume * profile.num_examples)
    if len(train) < least:
        yield _warning(
            "volume",
            "train",
            expected=f"{least} rows or more",
            seen=f"{len(train)} rows",
            count=len(train),
        )


def _check_overlap(splits: Splits) -> Iterator[Violation]:
    """Find examples to choose or judge by that were also learned from."""
    known = set(_rows(splits.train.inputs))
    names: tuple[SplitName, ...] = ("validation", "test")
    for name in names:
        rows = _rows(splits[name].inputs)
        count = sum(row in known for row in rows)
        if count > MAX_OVERLAP * len(rows):
            yield _warning(
                "overlap",
                name,
                expected=f"<= {MAX_OVERLAP:.0%} of it in train",
                seen=f"{count / len(rows):.1%} of it in train",
                count=count,
            )


def _check_leaks(train: Split, schema: Schema) -> Iterator[Violation]:
    """Find columns that are the target under another name."""
    if train.targets.ndim != 1 or len(schema.columns) < 2:
        return
    targets = train.targets.astype(np.float64)
    names = tuple(column.name for column in schema.columns)
    for name, values in iterate_columns(train.inputs, names):
        correlation = correlation_of(values, targets)
        if abs(correlation) > MAX_CORRELATION:
            yield _warning(
                "leak",
                f"train.{name}",
                expected=f"correlation with the target <= {MAX_CORRELATION}",
                seen=f"{correlation:.4f}",
                count=len(train),
            )


def correlation_of(values: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Give Pearson's correlation where both are present; 0 if either is constant there."""
    is_present = np.isfinite(values) & np.isfinite(others)
    x, y = values[is_present], others[is_present]
    if len(x) < 2:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / scale if scale > 0 else 0.0


def _rows(inputs: NDArray[Any]) -> list[bytes]:
    """Name each example by a digest of 16 bytes, so that images do not fill the memory."""
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in inputs]


def _first_few(values: NDArray[np.float64]) -> str:
    more = ", ..." if len(values) > NAMED_CATEGORIES else ""
    return ", ".join(f"{value:g}" for value in values[:NAMED_CATEGORIES]) + more


def _error(kind: Kind, path: str, *, expected: str, seen: str, count: int) -> Violation:
    return Violation(
        severity="error", kind=kind, path=path, expected=expected, seen=seen, count=count
    )


def _warning(kind: Kind, path: str, *, expected: str, seen: str, count: int) -> Violation:
    return Violation(
        severity="warning", kind=kind, path=path, expected=expected, seen=seen, count=count
    )
