"""Whether our server of `serving.py` watched what it was asked: from its monitor's own file."""

import shutil
import time
from pathlib import Path
from typing import Final

from rivals.serve_work import NAME

from minga.inference.monitor.keeper import TRAFFIC
from minga.inference.monitor.observer import MAX_CELLS
from minga.inference.monitor.store import Store

_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.2


def monitor_folder(model: Path) -> Path:
    """Give the folder where the server of a model's file keeps what it watched."""
    return model.with_suffix(".monitor")


class Watching:
    """What our server's monitor has seen so far, from outside.

    Args:
        model: the file that is served; what a server before kept of it is deleted.
        width: numbers in a row.
    """

    def __init__(self, model: Path, width: int) -> None:
        self._folder = monitor_folder(model)
        shutil.rmtree(self._folder, ignore_errors=True)
        # Of what comes between two looks it takes each second, third, ... row if it is too much.
        self._enough = MAX_CELLS // width // 2
        self._seen = 0

    def expect(self, num_rows: int) -> None:
        """Wait until the monitor has counted rows that were asked since this was last called.

        Args:
            num_rows: how many were. It need not have looked at all of so many.

        Raises:
            AssertionError: it has not, so a server without a monitor has been measured.
        """
        wanted, deadline = min(num_rows, self._enough), time.monotonic() + _TIMEOUT_S
        while (seen := self._rows()) < self._seen + wanted:
            if time.monotonic() > deadline:
                raise AssertionError(f"of {num_rows} rows {seen - self._seen} were watched")
            time.sleep(_POLL_S)
        self._seen = seen

    def _rows(self) -> int:
        """Count the rows of closed windows and of the open one."""
        store = Store(self._folder)
        try:
            found = store.state(NAME, "1", TRAFFIC)
            is_open = found is not None and found.open
            return store.count_rows(NAME, "1") + (found.open["rows"] if is_open else 0)
        finally:
            store.close()
