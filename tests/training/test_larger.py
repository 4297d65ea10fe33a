"""Data that stays on the disk: the same answers as in memory, in a fraction of it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.training import Split, Splits
from minga.training.candidate import Champion, assess
from minga.training.config import DataConfig, GateConfig
from minga.training.data import check, digest_of, profile_of, stored_splits
from minga.training.errors import DataError
from minga.training.export import to_onnx
from minga.training.loop import Learner, fit
from minga.training.network import build_network, parameters_of
from minga.training.probe import probe
from minga.training.stored import RowWriter, StoredRows

ROOT = Path(__file__).parents[2]
COLUMNS = ("a", "b", "kind", "d")
CATEGORIES = {"kind": ("L", "M", "H")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A stored array and the same in memory."""
    whole = np.arange(1000 * 3, dtype=np.float32).reshape(1000, 3)
    file = tmp_path_factory.mktemp("rows") / "rows.npy"
    with RowWriter(file, (3,), np.float32) as writer:
        writer.add(whole[:300])
        writer.add(whole[300:])
    return StoredRows(file), whole


@given(st.lists(st.integers(-1000, 999), max_size=20), st.slices(1000))
def test_stored_rows_are_those_of_the_array(rows, places, part):
    """Whatever rows are asked for, they are the array's."""
    stored, whole = rows
    np.testing.assert_array_equal(stored[part], whole[part])
    wanted = np.array(places, np.int64) % 1000
    np.testing.assert_array_equal(stored[wanted], whole[wanted])


def test_stored_rows_are_an_array(rows):
    """Shape, type, masks and numpy's own reader agree; out of range is an error."""
    stored, whole = rows
    assert (stored.shape, stored.dtype, len(stored)) == (whole.shape, whole.dtype, 1000)
    mask = whole[:, 0] % 2 == 0
    np.testing.assert_array_equal(stored[mask], whole[mask])
    np.testing.assert_array_equal(np.load(stored.path), whole)
    np.testing.assert_array_equal(np.asarray(stored), whole)
    np.testing.assert_array_equal(stored[-1], whole[-1])
    with pytest.raises(IndexError):
        stored[1000]


def test_stored_rows_travel_as_a_name(rows):
    """Another process gets the file's name and not its content."""
    stored, whole = rows
    sent = pickle.dumps(stored)
    assert len(sent) < 1000
    np.testing.assert_array_equal(pickle.loads(sent)[5:7], whole[5:7])


def test_cut_file_is_noticed(rows, tmp_path):
    """A file that ends too early is an error and not zeros."""
    cut = tmp_path / "cut.npy"
    cut.write_bytes(rows[0].path.read_bytes()[:-10])
    with pytest.raises(OSError, match="ends too early"):
        StoredRows(cut)[990:]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A Parquet file of 100,000 rows: numbers with holes, whole numbers, texts, a target."""
    generator = np.random.default_rng(0)
    num_rows = 100_000
    a = generator.normal(50, 10, num_rows)
    columns = {
        "a": np.where(generator.random(num_rows) < 0.01, np.nan, a),
        "b": generator.integers(0, 5, num_rows),
        "kind": generator.choice(["L", "M", "H"], num_rows),
        "d": generator.normal(size=num_rows) + (a > 50),
        "failure": (a > 50).astype(np.int8),
    }
    file = tmp_path_factory.mktemp("table") / "readings.parquet"
    pq.write_table(pa.table(columns), file, row_group_size=10_000)
    return file


@pytest.fixture(scope="module")
def both(table, tmp_path_factory):
    """The splits on the disk, and the same in memory."""
    stored = stored_splits(
        str(table),
        columns=COLUMNS,
        target="failure",
        categories=CATEGORIES,
        folder=tmp_path_factory.mktemp("stored") / "splits",
    )
    names = ("train", "validation", "test")
    whole = {
        name: Split(inputs=stored[name].inputs[:], targets=stored[name].targets) for name in names
    }
    return stored, Splits(**whole)


@pytest.fixture
def task(blobs, monkeypatch):
    """A Task of such a table."""
    monkeypatch.setattr(type(blobs), "columns", COLUMNS)
    return blobs


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Many chunks, as of a large file."""
    monkeypatch.setattr("minga.training.stored.CHUNK_BYTES", 100_000)


def test_splits_hold_each_row_once(both, table):
    """About a tenth validates and judges; no row is lost or there twice."""
    stored, _ = both
    sizes = [len(stored[name]) for name in ("train", "validation", "test")]
    assert sum(sizes) == 100_000
    assert sizes[1:] == pytest.approx([10_000, 10_000], rel=0.05)
    seen = np.concatenate([stored[n].inputs[:][:, 3] for n in ("train", "validation", "test")])
    wanted = pq.read_table(table)["d"].to_numpy().astype(np.float32)
    np.testing.assert_array_equal(np.sort(seen), np.sort(wanted))


def test_schema_profile_and_digest_are_those_of_memory(both, task):
    """Walking over the disk in pieces comes to what all rows at once come to."""
    stored, whole = both
    assert isinstance(stored.train.inputs, StoredRows)
    assert task.schema(stored.train) == task.schema(whole.train)
    assert digest_of(stored) == digest_of(whole)
    mine, theirs = profile_of(task, stored.train), profile_of(task, whole.train)
    for column, other in zip(mine.inputs, theirs.inputs, strict=True):
        assert column.edges == other.edges
        assert column.shares == other.shares
        assert (column.mean, column.deviation) == pytest.approx((other.mean, other.deviation))


def test_one_bad_value_is_found(both, task):
    """Every value is looked at: one unknown category among 80,000 rows is found."""
    stored, whole = both
    schema, profile = task.schema(whole.train), profile_of(task, whole.train)
    narrow = schema.columns[1].model_copy(update={"categories": (0.0, 1.0, 2.0, 3.0)})
    strict = schema.model_copy(update={"columns": (schema.columns[0], narrow, *schema.columns[2:])})
    config = DataConfig(source="a", max_missing=0.02)
    found = check(stored, strict, profile, config)
    assert found == check(whole, strict, profile, config)
    unknown = next(item for item in found if item.path == "train.b")
    assert unknown.count == (whole.train.inputs[:, 1] == 4).sum()


def test_training_gives_the_same_weights(both, task):
    """From the disk and from memory training is the same, bit by bit."""
    weights = []
    for splits in both:
        few = splits.train
        params = {**task.defaults, "batch_size": 4096}
        probe(task, params, splits)
        learner = Learner(task, build_network(task, params, few, seed=1), params)
        fit(learner, few, epochs=1, seed=1, validation=splits.validation)
        weights.append((parameters_of(learner.network), learner.history))
    (mine, history), (theirs, other) = weights
    assert history == other
    assert all(mine[name].tobytes() == theirs[name].tobytes() for name in mine)


def test_judgement_is_that_of_memory(both, task):
    """A candidate is measured, disturbed and compared on the disk as in memory, value by value."""
    reports = []
    schema, profile = task.schema(both[1].train), profile_of(task, both[1].train)
    for splits in both:
        networks = [build_network(task, task.defaults, splits.train, seed=seed) for seed in (1, 2)]
        champion = to_onnx(networks[0], splits.test.inputs[:1])
        found = assess(
            task,
            networks[1],
            splits.test,
            schema=schema,
            profile=profile,
            champion=Champion(version=1, onnx=champion, schema=schema),
            config=GateConfig(num_resamples=50, max_latency_ms=1000.0),
            seed=0,
        )
        gates = [gate for gate in found.report.gates if "latency" not in gate.name]
        reports.append((found.report.metrics, found.report.calibration, gates, found.onnx))
    assert reports[0] == reports[1]


def test_columns_are_read_in_pieces(rows, monkeypatch):
    """A Task's slices ask for columns: they are the array's, and never all rows at once."""
    stored, whole = rows
    monkeypatch.setattr("minga.training.stored.CHUNK_BYTES", 1200)
    most = []
    monkeypatch.setattr(
        StoredRows,
        "_read",
        lambda self, low, high, read=StoredRows._read: (
            most.append(high - low),
            read(self, low, high),
        )[1],
    )
    for part in (np.s_[:, 1], np.s_[..., 2], np.s_[10:900, [0, 2]], np.s_[::7, 1:], np.s_[5:5, 0]):
        np.testing.assert_array_equal(stored[part], whole[part])
    assert max(most) == 100
    with pytest.raises(IndexError, match="take other rows first"):
        stored[np.arange(3), 1]


def test_written_rows_are_used_again(table, tmp_path):
    """The same file is not read twice; another, or other columns, replace what was written."""

    def read(**changes):
        settings = {"columns": ("a", "b"), "target": "failure", "folder": tmp_path / "splits"}
        return stored_splits(str(table), **(settings | changes)).train.inputs.path

    first = read()
    before = first.stat().st_mtime_ns
    assert read() == first
    assert first.stat().st_mtime_ns == before
    assert read(columns=("a",)) != first
    assert not first.exists()


def test_too_few_rows_are_explained(tmp_path):
    """A table that leaves a split empty is refused."""
    pq.write_table(pa.table({"a": [1.0], "y": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="too few rows for a"):
        stored_splits(
            str(tmp_path / "a.parquet"), columns=("a",), target="y", folder=tmp_path / "splits"
        )


@pytest.mark.slow
def test_more_than_memory_is_worked_through(tmp_path):
    """1 GB is stored, described, checked and learned from where the kernel gives 0.85 GB."""
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks" / "data.py",
            *("--gigabytes", "1", "--cap", "0.85", "--folder", tmp_path),
            *("--json", tmp_path / "figures.json"),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["source_gb"] >= 1
    assert figures["peak_gb"] < 0.85
    assert figures["accuracy"] > 0.8
    assert not list(tmp_path.glob("**/*.parquet"))
