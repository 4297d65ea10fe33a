"""What commands write: results to stdout, everything on the way there to stderr.

With `--json` a command writes one JSON value to stdout and nothing else.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import TaskID

    from minga.training.gates import GateReport
    from minga.training.progress import OnProgress, Progress

PLAIN_WIDTH = 160
"""Columns of a table that no terminal shows: enough to cut nothing that matters."""


def print_json(value: Any) -> None:
    """Write one JSON value; dataclasses, pydantic models and paths are understood."""
    import orjson

    sys.stdout.write(
        orjson.dumps(value, default=_plain, option=orjson.OPT_INDENT_2).decode() + "\n"
    )


def print_line(text: str) -> None:
    """Write one line of result."""
    sys.stdout.write(text + "\n")


def print_note(text: str) -> None:
    """Write one line that is not the result."""
    sys.stderr.write(text + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, empty: str = "") -> None:
    """Write a table.

    Args:
        columns: their titles.
        rows: their cells, plain text.
        empty: is written instead if there is no row.
    """
    if not rows and empty:
        print_line(empty)
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    Console(file=sys.stdout, width=width).print(table)


def print_gates(report: "GateReport") -> None:
    """Write what each gate saw and wanted."""
    rows = [
        (gate.name, "passed" if gate.passed else "REFUSED", gate.seen, gate.goal)
        for gate in report.gates
    ]
    print_table(("gate", "verdict", "seen", "goal"), rows)


@contextmanager
def show_progress() -> Iterator["OnProgress"]:
    """Show progress on stderr: live bars on a terminal, else a line for each step forward."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    with Bars(
        TextColumn("{task.description:<9}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
        console=Console(stderr=True),
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: "Progress") -> None:
            if progress.step not in tasks:
                tasks[progress.step] = bars.add_task(progress.step, note="")
            bars.update(
                tasks[progress.step],
                completed=progress.done,
                total=progress.total or None,
                note=progress.note,
            )

        yield show


class _Lines:
    """Writes a line whenever a step moves on, but not for every note in between."""

    def __init__(self) -> None:
        self._last: tuple[str, int] | None = None

    def show(self, progress: "Progress") -> None:
        place = (progress.step, progress.done)
        if place != self._last:
            self._last = place
            total = f"/{progress.total}" if progress.total else ""
            note = f"  {progress.note}" if progress.note else ""
            print_note(f"{progress.step:<9} {progress.done}{total}{note}")


def _plain(value: Any) -> Any:
    dump = getattr(value, "model_dump", None)
    return dump(mode="json") if dump is not None else str(value)
