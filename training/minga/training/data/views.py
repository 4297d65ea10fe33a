"""Several sources as one table: units, times and duplicates settled by rules that are written down.

A view is a TOML file. The first source gives the rows; each later one adds columns to them, by key,
by the last reading at or before the row's time (an as-of join), or by both.

```toml
[[source]]
name = "machine"
uri = "machine.csv"
key = ["machine_id"]
time = "read_at"
timezone = "Europe/Madrid"
duplicates = "last"
[source.columns]
torque = "torque_nm"                                        # a new name
air_temp = { column = "air_c", unit = "degC", to = "kelvin" }

[[source]]
name = "weather"
uri = "sqlite:///weather.db#hourly"
time = "at"
tolerance = "2h"
```
"""

import tomllib
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from minga.training.config import Table
from minga.training.data.sources import read_table
from minga.training.errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

UNIT = b"unit"
"""Key of a column's unit in the metadata of the joined table's schema."""


FOUND = "__found__"
"""Column that tells, while two sources are joined, whether a row found its partner."""


class ColumnRule(Table):
    """Where a column of the view comes from, and in which unit it is wanted."""

    column: str
    """Its name in the source."""
    unit: str = ""
    """What the source gives, such as "degC" or "kW"; any unit that pint knows."""
    to: str = ""
    """What the view gives; the same unit if nothing is said."""


class SourceRule(Table):
    """One source of a view."""

    name: str
    """For messages."""
    uri: str
    """A relative path is taken from the view's folder."""
    key: list[str] = Field(default_factory=list)
    """Columns that say which thing a row is about; in a later source, where it must match."""
    time: str = ""
    """Column that says when a row was true; empty if it always is."""
    timezone: str = "UTC"
    """Of times that do not say theirs. An hour that is there twice in autumn is the first one."""
    time_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Of times that are numbers, counted from 1970."""
    tolerance: str = ""
    """How old a later source's row may be, such as "10min"; any age if nothing is said."""
    duplicates: Literal["refuse", "first", "last", "mean"] = "refuse"
    """What becomes of rows with the same key and time."""
    required: bool = False
    """Whether rows that find nothing here are left out; otherwise they have missing values."""
    columns: dict[str, str | ColumnRule] = Field(default_factory=dict)
    """Column of the view -> column of the source; all of them under their own names if empty."""


class View(Table):
    """The content of a `.view.toml`."""

    source: Annotated[list[SourceRule], Field(min_length=1)]

    @field_validator("source")
    @classmethod
    def _names_differ(cls, rules: list[SourceRule]) -> list[SourceRule]:
        twice = [name for name, count in Counter(rule.name for rule in rules).items() if count > 1]
        if twice:
            raise ValueError(f"two sources are called {twice[0]}")
        return rules


def read_view(file: str) -> "pa.Table":
    """Read and join a view's sources, in memory.

    Units of the columns that declare one are in the metadata of the table's schema.

    Raises:
        DataError: the file is no view, a source cannot be read, or a rule cannot be kept.
    """
    import pyarrow as pa

    path = Path(file)
    rules = _load(path).source
    frames = [_prepared(rule, path.parent) for rule in rules]
    joined = frames[0]
    for rule, frame in zip(rules[1:], frames[1:], strict=True):
        joined = _join(joined, rules[0], frame, rule)
    table = pa.Table.from_pandas(joined, preserve_index=False).replace_schema_metadata(None)
    return _with_units(table, {name: unit for rule in rules for name, unit in _units(rule).items()})


def sources_of(file: Path) -> tuple[str, ...]:
    """Give the URIs of a view's sources.

    Raises:
        DataError: the file is no view.
    """
    return tuple(_located(rule.uri, file.parent) for rule in _load(file).source)


def _load(file: Path) -> View:
    try:
        return View.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read as a view: {error}") from error
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
        )
        raise DataError(f"{file}: {problems}") from None


def _located(uri: str, folder: Path) -> str:
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        return f"sqlite:///{folder.absolute()}/{uri.removeprefix('sqlite:///')}"
    return uri if "://" in uri else str(folder / uri)


def _prepared(rule: SourceRule, folder: Path) -> "pd.DataFrame":
    """Read one source and settle names, units, times and duplicates."""
    frame = read_table(_located(rule.uri, folder)).to_pandas()
    _require(rule, frame, [*rule.key, *([rule.time] if rule.time else [])])
    chosen = {
        name: ColumnRule(column=column) if isinstance(column, str) else column
        for name, column in rule.columns.items()
    } or {name: ColumnRule(column=name) for name in frame.columns}
    _require(rule, frame, [column.column for column in chosen.values()])
    index = [*rule.key, *([rule.time] if rule.time else [])]
    prepared = frame[index].copy()
    if rule.time:
        prepared[rule.time] = _times(frame[rule.time], rule)
    for name, column in chosen.items():
        if name not in index:
            prepared[name] = _converted(frame[column.column], column, rule)
    if index:
        prepared = _without_duplicates(prepared, index, rule)
    return prepared.sort_values(rule.time, kind="stable") if rule.time else prepared


def _times(values: "pd.Series[Any]", rule: SourceRule) -> "pd.Series[Any]":
    import pandas as pd

    try:
        if pd.api.types.is_numeric_dtype(values):
            times = pd.to_datetime(values, unit=rule.time_unit, utc=True)
        else:
            times = pd.to_datetime(values)
            if times.dt.tz is None:
                times = times.dt.tz_localize(
                    rule.timezone, ambiguous=[True] * len(times), nonexistent="shift_forward"
                )
        times = times.dt.tz_convert("UTC").dt.as_unit("ns")
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{rule.name}.{rule.time} holds no times: {error}") from error
    if times.isna().any():
        raise DataError(f"{rule.name}.{rule.time} lacks {int(times.isna().sum())} times")
    return times


def _converted(values: "pd.Series[Any]", column: ColumnRule, rule: SourceRule) -> "pd.Series[Any]":
    if not column.to or column.to == column.unit:
        return values
    import pandas as pd
    import pint

    registry: Any = pint.UnitRegistry(autoconvert_offset_to_baseunit=True)
    try:
        quantity = registry.Quantity(values.to_numpy(float), column.unit)
        return pd.Series(quantity.to(column.to).magnitude, index=values.index)
    except (pint.errors.PintError, AttributeError, ValueError, TypeError) as error:
        raise DataError(
            f"{rule.name}.{column.column} does not convert from {column.unit!r} to {column.to!r}: "
            f"{error}"
        ) from error


def _without_duplicates(
    frame: "pd.DataFrame", index: list[str], rule: SourceRule
) -> "pd.DataFrame":
    repeated = frame.duplicated(subset=index)
    if not repeated.any():
        return frame
    if rule.duplicates == "refuse":
        example = ", ".join(f"{name} {frame.loc[repeated, name].iloc[0]}" for name in index)
        raise DataError(
            f"{rule.name} has {int(repeated.sum())} rows twice, such as {example}; "
            'set duplicates = "first", "last" or "mean"'
        )
    if rule.duplicates == "mean":
        numbers = set(frame.select_dtypes("number").columns) - set(index)
        how = {name: "mean" if name in numbers else "last" for name in frame if name not in index}
        return frame.groupby(index, sort=False, as_index=False).agg(how)
    return frame.drop_duplicates(subset=index, keep=rule.duplicates)


def _join(
    joined: "pd.DataFrame", base: SourceRule, frame: "pd.DataFrame", rule: SourceRule
) -> "pd.DataFrame":
    import pandas as pd

    if rule.time and not base.time:
        raise DataError(f"{rule.name} has a time but {base.name} has none to align it with")
    if not rule.time and not rule.key:
        raise DataError(f"{rule.name} has neither key nor time to be joined by")
    _require(base, joined, rule.key)
    frame = frame.assign(**{FOUND: True})
    clash = (set(joined) & set(frame)) - set(rule.key) - {rule.time}
    if clash:
        raise DataError(
            f"{rule.name} has a column {min(clash)} as an earlier source has; "
            "rename it in its [source.columns]"
        )
    if rule.time:
        matched = pd.merge_asof(
            joined,
            frame.rename(columns={rule.time: base.time}),
            on=base.time,
            by=rule.key or None,
            tolerance=pd.Timedelta(rule.tolerance) if rule.tolerance else None,
        )
    else:
        matched = joined.merge(frame, on=rule.key, how="left", validate="many_to_one")
    if rule.required:
        matched = matched[matched[FOUND].notna()]
    return matched.drop(columns=FOUND)


def _require(rule: SourceRule, frame: "pd.DataFrame", columns: list[str]) -> None:
    missing = [name for name in columns if name not in frame]
    if missing:
        known = ", ".join(map(str, frame.columns))
        raise DataError(f"{rule.name} has no column {', '.join(missing)}; it has {known}")


def _units(rule: SourceRule) -> dict[str, str]:
    columns = {name: column for name, column in rule.columns.items() if not isinstance(column, str)}
    return {name: column.to or column.unit for name, column in columns.items()}


def _with_units(table: "pa.Table", units: dict[str, str]) -> "pa.Table":
    import pyarrow as pa

    fields = [
        field.with_metadata({UNIT: units[field.name].encode()}) if units.get(field.name) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))
