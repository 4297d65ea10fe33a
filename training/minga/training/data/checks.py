"""Checks of data before it is used.

Errors stop a run: shapes, types, emptiness, missing values, unknown categories in training data.
Warnings do not, unless `[data] strict` is set: ranges, drift, volume, values that should be unique,
examples that are in two splits, a column that gives the target away.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minga.training.config import DataConfig
from minga.training.data.reading import sample_of_split
from minga.training.data.tallies import Tally, row_digests, tally_columns
from minga.training.data.versions import DataVersion
from minga.training.document import Document
from minga.training.errors import SchemaError
from minga.training.profile import Profile
from minga.training.schema import Schema, iterate_columns
from minga.training.stored import chunks_of
from minga.training.task import Split, SplitName, Splits
from minga.training.uris import PublicUri

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
    source: PublicUri
    digest: str
    versions: tuple[DataVersion, ...] = ()
    """Of the files behind the source."""
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
    references = {column.name: column for column in profile.inputs} if profile else {}
    for tally in tally_columns(split.inputs, schema.columns, references):
        path = f"{name}.{tally.column.name}"
        yield from _judge(tally, path, config, is_train=name == "train")
    if schema.targets:
        table = split.targets[:, None] if split.targets.ndim == 1 else split.targets
        for tally in tally_columns(table, schema.targets, {}):
            yield from _judge(tally, f"{name}.targets", config, is_train=name == "train")


def _judge(tally: Tally, path: str, config: DataConfig, *, is_train: bool) -> Iterator[Violation]:
    """Say what a column's values have against it."""
    column = tally.column
    yield from _judge_missing(tally, path, config)
    if tally.num_unknown:
        kind = _error if is_train else _warning
        yield kind(
            "category",
            path,
            expected="one of " + ", ".join(column.named(value) for value in column.categories),
            seen=_first_few(tally.unknown),
            count=tally.num_unknown,
        )
    if tally.num_outside > config.max_out_of_range * tally.num_present:
        share = tally.num_outside / tally.num_present
        yield _warning(
            "range",
            path,
            expected=f"{column.low:g} .. {column.high:g}",
            seen=f"{tally.low:g} .. {tally.high:g}, {share:.2%} outside",
            count=tally.num_outside,
        )
    if tally.num_fractions:
        yield _warning(
            "type",
            path,
            expected="whole numbers",
            seen="fractions too",
            count=tally.num_fractions,
        )
    if tally.num_repeated:
        yield _warning(
            "duplicate",
            path,
            expected="each value once",
            seen="values repeat",
            count=tally.num_repeated,
        )
    if tally.drift > config.max_drift:
        yield _warning(
            "drift",
            path,
            expected=f"<= {config.max_drift}",
            seen=f"{tally.drift:.3f}",
            count=tally.num_present,
        )


def _judge_missing(tally: Tally, path: str, config: DataConfig) -> Iterator[Violation]:
    """A column with holes in the reference may have as many again, by the luck of the draw."""
    usual = tally.column.missing
    luck = math.sqrt(usual * (1 - usual) / tally.num_values)
    allowed = max(config.max_missing, usual + MISSING_DEVIATIONS * luck)
    num_missing = tally.num_values - tally.num_present
    if num_missing > allowed * tally.num_values:
        yield _error(
            "missing",
            path,
            expected=f"<= {allowed:.2%}",
            seen=f"{num_missing / tally.num_values:.2%}",
            count=num_missing,
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
    names: tuple[SplitName, ...] = ("validation", "test")
    for name in names:
        digests, counts = np.unique(row_digests(splits[name].inputs), return_counts=True)
        is_known = np.zeros(len(digests), bool)
        for chunk in chunks_of(splits.train.inputs):
            learned = row_digests(chunk)
            places = np.minimum(np.searchsorted(digests, learned), len(digests) - 1)
            is_known[places[digests[places] == learned]] = True
        count, num_rows = int(counts[is_known].sum()), int(counts.sum())
        if count > MAX_OVERLAP * num_rows:
            yield _warning(
                "overlap",
                name,
                expected=f"<= {MAX_OVERLAP:.0%} of it in train",
                seen=f"{count / num_rows:.1%} of it in train",
                count=count,
            )


def _check_leaks(train: Split, schema: Schema) -> Iterator[Violation]:
    """Find columns that are the target under another name; in a sample, where data is large."""
    if train.targets.ndim != 1 or len(schema.columns) < 2:
        return
    few = sample_of_split(train)
    targets = few.targets.astype(np.float64)
    names = tuple(column.name for column in schema.columns)
    for name, values in iterate_columns(few.inputs, names):
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
