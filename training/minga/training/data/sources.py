"""Tables, arrays and images from wherever they are; see `minga.training.uris` for the URIs.

What is opened needs `pip install 'minga[data]'`, and S3 `minga[s3]`, which takes its credentials
from where AWS's own tools do (AWS_PROFILE, AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and so on).
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minga.inference.uris import redacted, scrubbed
from minga.training.errors import DataError
from minga.training.uris import Kind, expanded, kind_of

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 1 << 16
"""Rows that are in memory at once while a source is streamed."""

CSV_BLOCK_BYTES = 4 << 20
"""Of a table of text that is read at once; a column's type is taken from the first such block."""

PARQUET_BUFFER_BYTES = 1 << 20
"""Of each column of Parquet that is read at once."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, slots=True, kw_only=True)
class Images:
    """The images of a folder that holds one folder for each class.

    Attributes:
        images: uint8 of shape `(n, channels, height, width)`.
        labels: int64 of shape `(n,)`, places in `classes`.
        classes: names of the folders, sorted.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]


def read_table(source: str, columns: Sequence[str] = ()) -> "pa.Table":
    """Read a table into memory.

    Args:
        source: a URI; `${NAME}` in it is taken from the environment.
        columns: the columns to read, in this order; none means all.

    Raises:
        DataError: there is no such source or column, or it cannot be read.
    """
    import pyarrow as pa

    if kind_of(source) is Kind.VIEW:
        from minga.training.data.views import read_view

        table = read_view(source)
        return table.select(list(columns)) if columns else table
    with _explained(source):
        batches = list(_batches(expanded(source), columns, BATCH_ROWS))
        tables = [pa.Table.from_batches([batch]) for batch in batches]
        return pa.concat_tables(tables, promote_options="permissive")


def stream_table(
    source: str, columns: Sequence[str] = (), *, rows: int = BATCH_ROWS
) -> Iterator["pa.RecordBatch"]:
    """Read a table piece by piece; never more than some pieces are in memory.

    Args:
        source: a URI. A view is joined in memory first.
        columns: the columns to read, in this order; none means all.
        rows: at most so many are in a piece.

    Yields:
        the pieces in the order of the source. At least one, which may be empty.

    Raises:
        DataError: there is no such source or column, or it cannot be read.
    """
    if kind_of(source) is Kind.VIEW:
        yield from read_table(source, columns).to_batches(max_chunksize=rows)
        return
    with _explained(source):
        yield from _batches(expanded(source), columns, rows)


def read_arrays(source: str) -> dict[str, NDArray[Any]]:
    """Read the arrays of an `.npz` file; nothing that would run code is loaded.

    Raises:
        DataError: there is no such file, or it holds something else than plain arrays.
    """
    import fsspec

    with (
        _explained(source),
        fsspec.open(expanded(source), "rb") as file,
        np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays,
    ):
        return {name: arrays[name] for name in arrays.files}


def read_images(source: str, *, size: tuple[int, int] | None = None, grey: bool = False) -> Images:
    """Read a folder of images that has one folder for each class.

    Args:
        source: a folder, on any file system that fsspec has.
        size: height and width to scale to; without it all images must have one size.
        grey: give one channel instead of three.

    Raises:
        DataError: there are no images, they differ in size, or one cannot be decoded.
    """
    from fsspec.core import url_to_fs
    from PIL import Image

    with _explained(source):
        system, folder = url_to_fs(expanded(source))
        files = sorted(
            file for file in system.find(folder) if file.lower().endswith(IMAGE_SUFFIXES)
        )
        names = [file.removeprefix(folder.rstrip("/") + "/").split("/")[0] for file in files]
        if not files:
            raise DataError(f"{redacted(source)} holds no images; give a folder of folders of them")
        classes = sorted(set(names))
        images = []
        for file in files:
            with system.open(file, "rb") as opened, Image.open(opened) as image:
                decoded = image.convert("L" if grey else "RGB")
                images.append(np.asarray(decoded.resize(size[::-1]) if size else decoded, np.uint8))
        sizes = {image.shape[:2] for image in images}
        if len(sizes) > 1:
            raise DataError(f"{redacted(source)} holds images of {len(sizes)} sizes; give a size")
    stacked = np.stack(images)
    return Images(
        images=stacked[:, None] if grey else np.ascontiguousarray(np.moveaxis(stacked, -1, 1)),
        labels=np.array([classes.index(name) for name in names], np.int64),
        classes=tuple(classes),
    )


def _batches(uri: str, columns: Sequence[str], rows: int) -> Iterator["pa.RecordBatch"]:
    match kind_of(uri):
        case Kind.SQL:
            return _sql_batches(uri, columns, rows)
        case Kind.NPZ:
            return _npz_batches(uri, columns, rows)
        case kind:
            return _file_batches(uri, columns, rows, kind)


def _file_batches(
    uri: str, columns: Sequence[str], rows: int, kind: Kind
) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa
    from fsspec.core import url_to_fs
    from pyarrow import csv
    from pyarrow import dataset as ds

    system, path = url_to_fs(uri)
    layout: Any = "parquet"
    if kind is Kind.CSV:
        layout = ds.CsvFileFormat(
            parse_options=csv.ParseOptions(delimiter="\t" if ".tsv" in path.lower() else ","),
            read_options=csv.ReadOptions(block_size=CSV_BLOCK_BYTES),
        )
    found = ds.dataset(path, filesystem=system, format=layout)
    _require_columns(columns, found.schema.names)
    # Read through a small buffer instead of whole row groups ahead: memory before speed.
    lean = ds.ParquetFragmentScanOptions(
        pre_buffer=False, use_buffered_stream=True, buffer_size=PARQUET_BUFFER_BYTES
    )
    scanner = found.scanner(
        columns=list(columns) or None,
        batch_size=rows,
        batch_readahead=1,
        fragment_readahead=1,
        use_threads=False,
        fragment_scan_options=lean if layout == "parquet" else None,
    )
    is_empty = True
    for batch in scanner.to_batches():
        if batch.num_rows:
            is_empty = False
            yield batch
    if is_empty:
        yield pa.RecordBatch.from_pylist([], scanner.projected_schema)


def _npz_batches(uri: str, columns: Sequence[str], rows: int) -> Iterator["pa.RecordBatch"]:
    """Take arrays of shape `(n,)` as columns, and of shape `(n, k)` as k columns."""
    import pyarrow as pa

    found: dict[str, NDArray[Any]] = {}
    for name, array in read_arrays(uri).items():
        if array.ndim == 1:
            found[name] = array
        elif array.ndim == 2:
            found |= {f"{name}{index}": array[:, index] for index in range(array.shape[1])}
        else:
            raise DataError(f"{name} has shape {array.shape}, which is no column; use read_arrays")
    _require_columns(columns, list(found))
    table = pa.table({name: found[name] for name in (columns or found)})
    yield from table.to_batches(max_chunksize=rows) or [
        pa.RecordBatch.from_pylist([], table.schema)
    ]


def _sql_batches(uri: str, columns: Sequence[str], rows: int) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa
    import sqlalchemy as sql

    url, _, query = uri.partition("#")
    engine = sql.create_engine(url, hide_parameters=True)
    try:
        _require_database(engine.url)
        with engine.connect() as connection:
            options = {"stream_results": True, "yield_per": rows}
            result = connection.execution_options(**options).execute(_statement(url, query))
            names = list(result.keys())
            _require_columns(columns, names)
            wanted = [names.index(name) for name in columns] or range(len(names))
            is_empty = True
            for part in result.partitions(rows):
                is_empty = False
                cells = list(zip(*part, strict=True))
                yield pa.RecordBatch.from_pydict({names[index]: cells[index] for index in wanted})
            if is_empty:
                yield pa.RecordBatch.from_pydict({names[index]: [] for index in wanted})
    finally:
        engine.dispose()


def _statement(url: str, query: str) -> Any:
    """Make the statement of a URL's part behind `#`: a table's name, or a SELECT."""
    import sqlalchemy as sql

    if not query:
        raise DataError(f"{redacted(url)} does not say which table; add #table or #SELECT ...")
    if " " in query.strip():
        if not query.lstrip().lower().startswith(("select ", "with ")):
            raise DataError(f"{query!r} is no SELECT; a source only reads")
        return sql.text(query)
    schema, _, name = query.strip().rpartition(".")
    return sql.select(sql.text("*")).select_from(sql.table(name, schema=schema or None))


def _require_database(url: Any) -> None:
    """Refuse a SQLite file that is not there: looking into it would make it."""
    is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
    if is_file and not Path(url.database).is_file():
        raise DataError(f"there is no database {url.database}")


def _require_columns(wanted: Sequence[str], found: Iterable[str]) -> None:
    known = list(found)
    missing = [name for name in wanted if name not in known]
    if missing:
        raise DataError(f"there is no column {', '.join(missing)}; there are {', '.join(known)}")


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Turn what libraries raise into errors that name the source, without its secrets."""
    try:
        yield
    except (DataError, ModuleNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001 - whatever a driver or a file system raises
        # Not chained: the driver's own error may quote the password.
        lines = str(error).strip().splitlines()
        reason = scrubbed(lines[0] if lines else "", source)
        raise DataError(
            f"{redacted(source)} cannot be read: {type(error).__name__}: {reason}"
        ) from None
