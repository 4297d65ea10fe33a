"""Several sources as one table: one test for each rule."""

import sqlite3
from contextlib import closing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minga.training.data import read_table
from minga.training.data.views import UNIT, sources_of
from minga.training.errors import DataError

MACHINE = """
[[source]]
name = "machine"
uri = "machine.csv"
key = ["machine"]
time = "read_at"
timezone = "Europe/Madrid"
duplicates = "last"
[source.columns]
torque = "torque_nm"
air_temp = { column = "air_c", unit = "degC", to = "kelvin" }
"""
WEATHER = """
[[source]]
name = "weather"
uri = "sqlite:///weather.db#hourly"
time = "at"
tolerance = "90min"
[source.columns]
humidity = "humidity"
"""
KIND = """
[[source]]
name = "kind"
uri = "kind.parquet"
key = ["machine"]
required = true
"""


@pytest.fixture
def view(tmp_path):
    """Writes a view of a CSV in local time, a database in UTC and a Parquet file, and reads it."""
    (tmp_path / "machine.csv").write_text(
        "machine,read_at,torque_nm,air_c\n"
        "1,2026-07-01 12:30:00,40,20\n"
        "2,2026-07-01 12:45:00,30,\n"
        "1,2026-07-01 14:00:00,50,21\n"
        "1,2026-07-01 12:30:00,41,20\n"
        "9,2026-07-01 12:30:00,10,20\n"
    )
    with closing(sqlite3.connect(tmp_path / "weather.db")) as database, database:
        database.execute("CREATE TABLE hourly (at TEXT, humidity REAL)")
        rows = [("2026-07-01 10:00:00", 0.5), ("2026-07-01 10:40:00", 0.7)]
        database.executemany("INSERT INTO hourly VALUES (?, ?)", rows)
    pq.write_table(pa.table({"machine": [1, 2], "kind": ["L", "H"]}), tmp_path / "kind.parquet")

    def read(text=MACHINE + WEATHER + KIND, *changes):
        for before, after in changes:
            assert before in text
            text = text.replace(before, after)
        (tmp_path / "plant.view.toml").write_text(text)
        return read_table(str(tmp_path / "plant.view.toml"))

    return read


def rows_of(table, *names):
    """Chosen columns, row by row."""
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def test_three_sources_are_one_table(view):
    """Rows of the first source get the last weather before them, and each machine's kind."""
    table = view()
    assert rows_of(table, "machine", "torque", "humidity", "kind") == [
        (1, 41, 0.5, "L"),
        (2, 30, 0.7, "H"),
        (1, 50, 0.7, "L"),
    ]


def test_units_are_converted_and_declared(view):
    """Degrees Celsius arrive as kelvin, missing values stay missing, the unit is on the column."""
    table = view()
    seen = table["air_temp"].to_numpy()
    np.testing.assert_allclose(seen, [293.15, np.nan, 294.15])
    assert table.schema.field("air_temp").metadata == {UNIT: b"kelvin"}


def test_wrong_units_are_refused(view):
    """A temperature does not become a mass, and a unit that nobody knows is named."""
    for unit in ("kilogram", "florins"):
        with pytest.raises(DataError, match=f"machine.air_c does not convert.*'{unit}'"):
            view(MACHINE, ('to = "kelvin"', f'to = "{unit}"'))


def test_old_rows_do_not_count(view):
    """A reading older than the tolerance is missing instead of wrong."""
    table = view(MACHINE + WEATHER, ("90min", "60min"))
    assert rows_of(table, "machine", "humidity")[-1] == (1, None)


def test_later_rows_do_not_count(view):
    """Alignment never looks ahead: what was measured later stays unknown."""
    table = view(MACHINE + WEATHER, ("Europe/Madrid", "Europe/Helsinki"))
    assert rows_of(table, "machine", "humidity")[0] == (1, None)


@pytest.mark.parametrize(("rule", "torque"), [("first", 40), ("last", 41), ("mean", 40.5)])
def test_duplicates_follow_their_rule(view, rule, torque):
    """Of two rows with the same key and time the first, the last or their mean is kept."""
    table = view(MACHINE, ('"last"', f'"{rule}"'))
    assert table["torque"][0].as_py() == torque
    assert len(table) == 4


def test_duplicates_are_refused_without_a_rule(view):
    """Without a rule two rows with the same key and time are an error that shows one."""
    with pytest.raises(DataError, match=r"machine has 1 rows twice, such as machine 1.*duplicates"):
        view(MACHINE, ('duplicates = "last"\n', ""))


def test_rows_without_a_partner_are_kept_or_left_out(view):
    """A machine of no known kind has a missing kind, or is left out if the kind is required."""
    assert 9 not in view()["machine"].to_pylist()
    kept = view(MACHINE + KIND, ("required = true", ""))
    assert (9, None) in rows_of(kept, "machine", "kind")


def test_hour_that_is_there_twice(view, tmp_path):
    """In the autumn night with two hours from 2 to 3 times stay in order, in UTC."""
    (tmp_path / "machine.csv").write_text(
        "machine,read_at,torque_nm,air_c\n1,2026-10-25 02:30:00,1,1\n1,2026-10-25 03:30:00,2,1\n"
    )
    times = [time.hour for time in view(MACHINE)["read_at"].to_pylist()]
    assert times == [0, 2]


def test_numbers_are_times_too(view, tmp_path):
    """Seconds since 1970 align with written times."""
    (tmp_path / "machine.csv").write_text(
        "machine,read_at,torque_nm,air_c\n1,1782901800,1,1\n"  # 2026-07-01 10:30 UTC
    )
    assert rows_of(view(MACHINE + WEATHER), "humidity") == [(0.5,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((("torque_nm", "torq"),), "machine has no column torq; it has machine"),
        ((('key = ["machine"]\nrequired', "required"),), "kind has neither key nor time"),
        ((('humidity = "humidity"', 'torque = "humidity"'),), "has a column torque as an earlier"),
        ((('name = "weather"', 'name = "kind"'),), "two sources are called kind"),
        ((('duplicates = "last"', 'duplicates = "any"'),), "source.0.duplicates: Input should be"),
        ((('time = "read_at"', 'time = "torque_nm"\ntime_unit = "h"'),), "source.0.time_unit"),
    ],
)
def test_rule_that_cannot_be_kept_is_explained(view, changes, message):
    """A view that does not fit its sources, or itself, says where."""
    with pytest.raises(DataError, match=message):
        view(MACHINE + WEATHER + KIND, *changes)


def test_sources_of_a_view_are_found_from_its_folder(view, tmp_path):
    """Relative files and databases lie beside the view."""
    view()
    assert sources_of(tmp_path / "plant.view.toml") == (
        f"{tmp_path}/machine.csv",
        f"sqlite:///{tmp_path}/weather.db#hourly",
        f"{tmp_path}/kind.parquet",
    )
