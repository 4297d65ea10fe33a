"""Splits of a table that does not fit into memory.

The table is read once, piece by piece, and its numbers are written to the disk as rows; what comes
back is three splits whose inputs stay there. Schema, profile, checks and preparation walk over
them in pieces, and training reads the rows of each batch. Targets are kept in memory.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.inference.uris import redacted
from minga.training.data.sources import stream_table
from minga.training.data.tables import matrix, numbers
from minga.training.data.versions import path_of
from minga.training.errors import DataError
from minga.training.stored import RowWriter, StoredRows
from minga.training.task import Split, SplitName, Splits

NAMES: tuple[SplitName, ...] = ("train", "validation", "test")

PIECE_ROWS = 1 << 15


def stored_splits(
    source: str,
    *,
    columns: Sequence[str],
    target: str,
    folder: Path,
    categories: Mapping[str, Sequence[str | float]] = MappingProxyType({}),
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.1,
) -> Splits:
    """Read a table of any size into splits on the disk; the seed decides which row goes where.

    What was written for the same files, columns and shares is used again.

    Args:
        source: as for `read_table`.
        columns: of the inputs, in their order.
        target: the column to learn.
        folder: of these splits alone; it grows to the size of the inputs as float32.
        categories: of the columns that hold text.
        seed: of the draw.
        validation: share of the rows, about.
        test: share of the rows, about.

    Raises:
        DataError: the source cannot be read, or a split gets no rows.
    """
    settings = (source, list(columns), target, _plain(categories), seed, validation, test)
    key = hashlib.sha256(json.dumps([*settings, _stamp(source)]).encode()).hexdigest()[:16]
    kept = folder / key
    if not kept.is_dir():
        part = folder / f"{key}.part"
        shutil.rmtree(folder, ignore_errors=True)
        part.mkdir(parents=True)
        pieces = _pieces(source, columns, target, categories)
        _write(part, pieces, len(columns), np.random.default_rng(seed), (validation, test))
        part.rename(kept)
    return Splits(**{name: _read(kept, name, source) for name in NAMES})


def _pieces(
    source: str,
    columns: Sequence[str],
    target: str,
    categories: Mapping[str, Sequence[str | float]],
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    wanted = dict.fromkeys((*columns, target))
    for piece in stream_table(source, tuple(wanted), rows=PIECE_ROWS):
        inputs = matrix(piece, columns, categories)
        yield inputs, numbers(piece, target, categories.get(target, ()))


def _write(
    folder: Path,
    pieces: Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]],
    num_columns: int,
    generator: np.random.Generator,
    shares: tuple[float, float],
) -> None:
    ends = np.cumsum((1 - sum(shares), *shares))[:-1]
    with ExitStack() as stack:
        writers = [
            (
                stack.enter_context(RowWriter(folder / f"{name}.npy", (num_columns,), np.float32)),
                stack.enter_context(RowWriter(folder / f"{name}.targets.npy", (), np.float32)),
            )
            for name in NAMES
        ]
        for inputs, targets in pieces:
            chosen = np.searchsorted(ends, generator.random(len(inputs)), side="right")
            for place, (input_writer, target_writer) in enumerate(writers):
                input_writer.add(inputs[chosen == place])
                target_writer.add(targets[chosen == place].astype(np.float32))


def _read(folder: Path, name: SplitName, source: str) -> Split:
    rows: Any = StoredRows(folder / f"{name}.npy")
    if not len(rows):
        raise DataError(
            f"{redacted(source)} has too few rows for a {name} split; give more, or other shares"
        )
    return Split(inputs=rows, targets=np.load(folder / f"{name}.targets.npy"))


def _stamp(source: str) -> list[tuple[str, int, int]]:
    """Tell files apart by name, size and time of change, as make does: digesting takes longer."""
    path = path_of(source)
    if path is None or not path.exists():
        return [(str(np.random.default_rng().integers(2**62)), 0, 0)]  # nobody can tell: read again
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _plain(categories: Mapping[str, Sequence[str | float]]) -> dict[str, list[str | float]]:
    return {name: list(values) for name, values in categories.items()}
