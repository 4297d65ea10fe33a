"""Tables, arrays and images from every kind of source."""

import gzip
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from datetime import datetime
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from PIL import Image

from minga.inference.uris import redacted
from minga.training import Split, Splits, Task
from minga.training.config import DataConfig
from minga.training.data import (
    in_order,
    matrix,
    read_arrays,
    read_images,
    read_splits,
    read_table,
    shuffled,
    stream_table,
)
from minga.training.errors import DataError
from minga.training.task import TaskReference

ROWS = 1000
TABLE = pa.table(
    {
        "torque": np.linspace(0, 1, ROWS),
        "gear": np.arange(ROWS) % 5,
        "type": np.array(["L", "M", "H", "M"])[np.arange(ROWS) % 4],
    }
)


def text_of(table):
    """The table as CSV."""
    lines = [",".join(table.column_names)]
    lines += [",".join(map(str, row.values())) for row in table.to_pylist()]
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The same table in every kind of source."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "a.csv").write_text(text_of(TABLE))
    (folder / "a.tsv").write_text(text_of(TABLE).replace(",", "\t"))
    with gzip.open(folder / "a.csv.gz", "wt") as file:
        file.write(text_of(TABLE))
    pq.write_table(TABLE, folder / "a.parquet")
    (folder / "parts").mkdir()
    for index in range(2):
        part = TABLE.slice(index * ROWS // 2, ROWS // 2)
        pq.write_table(part, folder / "parts" / f"{index}.parquet")
    arrays = {name: np.array(TABLE[name].to_pylist()) for name in TABLE.column_names}
    np.savez(folder / "a.npz", **arrays)
    with closing(sqlite3.connect(folder / "a.db")) as database, database:
        database.execute("CREATE TABLE readings (torque REAL, gear INTEGER, type TEXT)")
        rows = [tuple(row.values()) for row in TABLE.to_pylist()]
        database.executemany("INSERT INTO readings VALUES (?, ?, ?)", rows)
    return folder


SOURCES = (
    "{}/a.csv",
    "{}/a.tsv",
    "{}/a.csv.gz",
    "file://{}/a.parquet",
    "{}/parts",
    "{}/a.npz",
    "sqlite:///{}/a.db#readings",
    "sqlite:///{}/a.db#SELECT * FROM readings ORDER BY torque",
)


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_table(places, source):
    """Whatever the source, the numbers, texts and their order are the same."""
    read = read_table(source.format(places))
    assert read.to_pylist() == TABLE.to_pylist()


@pytest.mark.parametrize("source", SOURCES)
def test_streams_come_in_pieces(places, source):
    """Pieces have the size that was asked for, and chosen columns come in the chosen order."""
    pieces = list(stream_table(source.format(places), ("gear", "torque"), rows=300))
    assert max(piece.num_rows for piece in pieces) <= 300
    assert sum(piece.num_rows for piece in pieces) == ROWS
    assert pieces[0].schema.names == ["gear", "torque"]


@pytest.mark.parametrize("source", SOURCES)
def test_missing_column_is_named(places, source):
    """A column that is not there is an error that says which there are."""
    with pytest.raises(DataError, match="no column speed; there are torque, gear, type"):
        read_table(source.format(places), ("speed",))


@pytest.fixture(scope="module")
def store():
    """An object store that speaks S3, in a process of its own."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except OSError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def test_object_store_is_read_like_a_folder(places, store, monkeypatch):
    """The same URIs work on S3; credentials come from the environment, never from the URI."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", store)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "minga")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not a secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    system = s3fs.S3FileSystem()
    system.mkdir("plant")
    for name in ("a.csv.gz", "a.npz", "parts/0.parquet", "parts/1.parquet"):
        system.put(str(places / name), f"plant/{name}")
    for source in ("s3://plant/a.csv.gz", "s3://plant/parts", "s3://plant/a.npz"):
        assert read_table(source).to_pylist() == TABLE.to_pylist()
    with pytest.raises(DataError, match=r"s3://plant/absent.csv cannot be read"):
        read_table("s3://plant/absent.csv")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{}/absent.csv", "cannot be read: FileNotFoundError"),
        ("{}/a.xlsx", "no source that Minga knows"),
        ("sqlite:///{}/absent.db#readings", "there is no database"),
        ("sqlite:///{}/a.db", "does not say which table; add #table"),
        ("sqlite:///{}/a.db#absent", "no such table"),
        ("sqlite:///{}/a.db#DELETE FROM readings", "is no SELECT"),
        ("postgresql://minga:${{MINGA_ABSENT}}@db/plant#readings", "needs MINGA_ABSENT"),
    ],
)
def test_bad_source_is_explained(places, source, message):
    """What cannot be read says why, and nothing is made by looking for it."""
    with pytest.raises(DataError, match=message):
        read_table(source.format(places))
    assert not (places / "absent.db").exists()


def test_numbers_that_begin_late_are_no_surprise(tmp_path):
    """A column that is empty in the first pieces of a database is still a column of numbers."""
    with closing(sqlite3.connect(tmp_path / "a.db")) as database, database:
        database.execute("CREATE TABLE t (x REAL)")
        database.executemany("INSERT INTO t VALUES (?)", [(None,)] * 70_000 + [(1.5,)])
    read = read_table(f"sqlite:///{tmp_path}/a.db#t")
    assert read["x"][-1].as_py() == 1.5
    assert read["x"].null_count == 70_000


def test_arrays_with_code_inside_are_refused(tmp_path):
    """An .npz that holds pickled objects is not loaded."""
    np.savez(tmp_path / "a.npz", x=np.array([{}], object))
    with pytest.raises(DataError, match="cannot be read"):
        read_arrays(str(tmp_path / "a.npz"))


@pytest.fixture
def pictures(tmp_path):
    """Two classes of small pictures."""
    for name, shade in (("sick", 200), ("healthy", 50)):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (8, 6), (shade, 0, index)).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_image_folders_are_classes(pictures):
    """A folder of folders gives pixels, labels and the names of the classes."""
    found = read_images(str(pictures))
    assert found.images.shape == (6, 3, 6, 8)
    assert found.classes == ("healthy", "sick")
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.images[3, :, 0, 0].tolist() == [200, 0, 0]
    assert read_images(str(pictures), size=(4, 4), grey=True).images.shape == (6, 1, 4, 4)


def test_images_of_two_sizes_need_one(pictures):
    """Images that do not stack are refused unless a size is given; so are files that are none."""
    Image.new("RGB", (9, 9)).save(pictures / "sick" / "large.png")
    with pytest.raises(DataError, match="2 sizes; give a size"):
        read_images(str(pictures))
    (pictures / "sick" / "large.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read: UnidentifiedImageError"):
        read_images(str(pictures), size=(4, 4))


def test_texts_become_places_among_categories():
    """Texts become codes, unknown ones -1, missing values NaN; the order of columns is kept."""
    table = pa.table({"type": ["H", None, "X", "L"], "x": [1, None, 3, 4]})
    made = matrix(table, ("x", "type"), {"type": ("L", "M", "H")})
    np.testing.assert_array_equal(made, np.array([[1, 2], [np.nan, np.nan], [3, -1], [4, 0]], "f4"))
    assert made.dtype == np.float32


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"x": ["a"]}), r"holds text such as 'a'; say which"),
        (pa.table({"x": [datetime(2026, 1, 1)]}), "holds timestamp"),
        (pa.table({"y": [1]}), "no column x; there are y"),
    ],
)
def test_what_is_no_number_is_explained(table, message):
    """Texts without categories, times and absent columns are refused by name."""
    with pytest.raises(DataError, match=message):
        matrix(table, ("x",))


def test_splits_are_disjoint_and_whole():
    """Shuffled splits hold each example once; splits in order keep it."""
    rows = np.arange(10)
    for splits in (shuffled(rows[:, None], rows, seed=3), in_order(rows[:, None], rows)):
        parts = [splits[name].targets.tolist() for name in ("train", "validation", "test")]
        assert [len(part) for part in parts] == [6, 2, 2]
        assert sorted(chain.from_iterable(parts)) == rows.tolist()
    assert parts == [[0, 1, 2, 3, 4, 5], [6, 7], [8, 9]]
    with pytest.raises(DataError, match="2 examples cannot be split"):
        shuffled(rows[:2], rows[:2])


SECRET = "postgresql://minga:s3cr%21t@db.example/plant?sslpassword=hunter2#readings"


def test_passwords_leave_no_trace():
    """No password of a URI is in settings, messages or reports; placeholders are."""
    shown = redacted(SECRET)
    assert shown == "postgresql://minga:***@db.example/plant?sslpassword=***#readings"
    assert redacted("postgresql://minga:${PLANT_PASSWORD}@db/plant") == (
        "postgresql://minga:${PLANT_PASSWORD}@db/plant"
    )
    for raw in ("pa/ss", "p@ss", "pa?ss", "pa#ss", "pa:ss"):
        assert (
            redacted(f"postgresql://minga:{raw}@db/plant#t") == "postgresql://minga:***@db/plant#t"
        )
    assert redacted("https://b/x.csv?X-Amz-Signature=abc&v=1") == (
        "https://b/x.csv?X-Amz-Signature=***&v=1"
    )
    assert DataConfig(source=SECRET).model_dump()["source"] == shown
    assert DataConfig(source=SECRET).source == SECRET


def test_drivers_errors_are_scrubbed(monkeypatch):
    """A password from the environment is not in the error of a driver that quotes its URL."""
    monkeypatch.setenv("PLANT_PASSWORD", "hunter2")

    class Talkative(Task):
        def data(self, source):
            raise OSError("cannot connect to db with s3cr!t or hunter2")  # as drivers do

        model = loss = metrics = None

    with pytest.raises(DataError) as caught:
        read_splits(Talkative(), SECRET)
    assert "s3cr" not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    with pytest.raises(DataError) as caught:
        read_splits(Talkative(), "postgresql://minga:${PLANT_PASSWORD}@db/plant")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_table("mysql+absent://minga:${PLANT_PASSWORD}@db/plant#t")
    assert "hunter2" not in str(caught.value)


def test_databases_are_found_from_the_project(tmp_path):
    """A relative SQLite path is taken from the project folder, as files are."""
    reference = TaskReference(root=tmp_path, name="task.py:T")
    assert reference.resolve("sqlite:///a.db#t") == f"sqlite:///{tmp_path}/a.db#t"
    assert reference.resolve("sqlite:////x/a.db#t") == "sqlite:////x/a.db#t"
    assert reference.resolve("s3://bucket/a.csv") == "s3://bucket/a.csv"


def test_split_takes_what_matrix_gives():
    """A table's numbers are a split's inputs as they are, without a copy of another type."""
    inputs = matrix(TABLE, ("torque", "gear"))
    split = Split(inputs=inputs, targets=np.zeros(ROWS))
    assert split.inputs is inputs
    assert isinstance(Splits(train=split, validation=split, test=split), Splits)
