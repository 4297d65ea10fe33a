"""Arrays that stay on the disk, for data larger than memory.

`StoredRows` looks like an array of shape `(n, ...)` where rows are asked for, and reads only those.
It reads with `pread` and does not map the file: what was read never counts as this process's memory
after it was used. It travels to other processes as the file's name.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_BYTES = 8 << 20
"""Of a stored array that is in memory at once where all of it is walked over."""

LARGE_ROWS = 2_000_000
"""An array in memory of more rows is walked over in pieces too."""

SAMPLE_ROWS = 200_000
"""Rows that stand for a stored array where an exact answer would need all of it in memory."""


class StoredRows:
    """Rows in an `.npy` file. Safe to use from several threads.

    Args:
        path: of the file, in C order.

    Raises:
        ValueError: the file is no such array.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0
            if version != (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = read(file)
            self._offset = file.tell()
        if is_fortran or dtype.hasobject or not shape:
            raise ValueError(f"{path} holds no rows of numbers in C order")
        self.path = path
        self.shape: tuple[int, ...] = shape
        self.dtype = np.dtype(dtype)
        self.ndim = len(shape)
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self._file = -1

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Read rows: a slice, a number, an array of numbers, or a mask.

        Columns are read piece by piece, so that one fits where the rows do not: `rows[:, 3]`,
        `rows[..., 0]`.

        Raises:
            IndexError: there is no such row, or columns are asked of rows that are no slice.
        """
        if rows is Ellipsis or isinstance(rows, tuple):
            return self._columns(*(rows if isinstance(rows, tuple) else (rows,)))
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._read(start, max(stop, start))
            rows = np.arange(start, stop, step)
        wanted = np.asarray(rows)
        if wanted.ndim == 0:
            place = int(wanted) % len(self) if -len(self) <= int(wanted) < len(self) else len(self)
            if place == len(self):
                raise IndexError(f"row {int(wanted)} of {len(self)}")
            row: NDArray[Any] = self._read(place, place + 1)[0]
            return row
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        return self._gather(wanted)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return self[:].astype(dtype or self.dtype, copy=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": -1}

    def __del__(self) -> None:
        if getattr(self, "_file", -1) >= 0:
            os.close(self._file)

    def _columns(self, first: Any = ..., *others: Any) -> NDArray[Any]:
        is_slice = isinstance(first, slice)
        if not is_slice and first is not Ellipsis:
            raise IndexError("columns are read of a slice of rows: take other rows first")
        start, stop, step = (first if is_slice else slice(None)).indices(len(self))
        places, size = range(start, stop, step), rows_at_once(self)
        parts = [places[low : low + size] for low in range(0, max(len(places), 1), size)]
        within = (slice(None) if is_slice else ..., *others)
        return np.concatenate([self._ranged(part)[within] for part in parts])

    def _ranged(self, places: range) -> NDArray[Any]:
        is_whole = places.step == 1 and len(places) > 0
        return self[places.start : places.stop] if is_whole else self[np.asarray(places, np.int64)]

    def _gather(self, wanted: NDArray[np.int64]) -> NDArray[Any]:
        out = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        view = out.reshape(-1).view(np.uint8).data
        for place in np.argsort(wanted, kind="stable").tolist():  # the disk likes order
            part = view[place * self._row_bytes : (place + 1) * self._row_bytes]
            self._fill(part, int(wanted[place]))
        return out

    def _read(self, start: int, stop: int) -> NDArray[Any]:
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        if out.size:
            self._fill(out.reshape(-1).view(np.uint8).data, start)
        return out

    def _fill(self, part: memoryview, row: int) -> None:
        if self._file < 0:
            self._file = os.open(self.path, os.O_RDONLY)
        offset, done = self._offset + row * self._row_bytes, 0
        while done < len(part):
            count = os.preadv(self._file, [part[done:]], offset + done)
            if count == 0:
                raise OSError(f"{self.path} ends too early: was it cut?")
            done += count


def chunks_of(array: Any) -> Iterator[NDArray[Any]]:
    """Walk over an array: all of it at once, or one that is large in pieces of rows."""
    if not is_large(array):
        yield array
        return
    rows = rows_at_once(array)
    for start in range(0, len(array), rows):
        yield array[start : start + rows]


def rows_at_once(array: Any) -> int:
    """Give how many rows of an array take `CHUNK_BYTES`."""
    row_bytes = max(int(np.prod(array.shape[1:])) * array.dtype.itemsize, 1)
    return int(max(CHUNK_BYTES // row_bytes, 1))


def is_large(array: Any) -> bool:
    """Tell whether an array stays on the disk, or belongs to one that does, as its targets do."""
    return isinstance(array, StoredRows) or len(array) > LARGE_ROWS


def sample_of(array: Any, num_rows: int = SAMPLE_ROWS) -> NDArray[Any]:
    """Give an array as it is, or a large one's rows at equal distances, at most `num_rows`."""
    if not is_large(array):
        whole: NDArray[Any] = array
        return whole
    return np.asarray(array[sample_places(len(array), num_rows)])


def sample_places(num_rows: int, num_wanted: int = SAMPLE_ROWS) -> NDArray[np.int64]:
    """Give rows at equal distances, all of them if they are few."""
    return np.linspace(0, num_rows - 1, min(num_rows, num_wanted)).round().astype(np.int64)


class RowWriter:
    """Writes an `.npy` file whose number of rows is known only at the end."""

    def __init__(self, path: Path, row_shape: tuple[int, ...], dtype: Any) -> None:
        self._path, self._row_shape, self._dtype = path, row_shape, np.dtype(dtype)
        self._num_rows = 0

    def __enter__(self) -> "RowWriter":
        self._file = self._path.open("wb")
        self._header()
        return self

    def add(self, rows: NDArray[Any]) -> None:
        """Write rows behind those that are there.

        Raises:
            ValueError: they differ in shape or type.
        """
        if rows.shape[1:] != self._row_shape or rows.dtype != self._dtype:
            raise ValueError(f"rows are {rows.dtype} {rows.shape[1:]}, were {self._dtype}")
        np.ascontiguousarray(rows).tofile(self._file)
        self._num_rows += len(rows)

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()

    def _header(self) -> None:
        """Write the header; numpy pads it, so that it keeps its length when the rows grow."""
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._num_rows, *self._row_shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)
