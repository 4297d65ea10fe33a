"""Epochs on their way to MLflow and TensorBoard while the work that makes them goes on.

A transaction of MLflow costs about 20 ms, more than an epoch of a small network, and a server may
be away for a while. So epochs wait in memory for a thread that writes all there are at once.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minga.training.history import Record
from minga.training.tracking import Tracker

WRITE_S = 1.0
"""Epochs wait so long to be written together."""


class Recorder:
    """Writes epochs of any number of runs; use it through `recording`.

    What a run has already of an epoch, from before an interruption, is not written again.
    """

    def __init__(self, tracker: Tracker, folder: Path) -> None:
        self._tracker = tracker
        self._folder = folder
        self._waiting: dict[str, list[Record]] = defaultdict(list)
        self._known: dict[str, set[tuple[int, str]]] = {}
        self._boards: dict[str, Any] = {}
        self._lock = threading.Lock()

    def open(self, run_id: str, name: str) -> None:
        """Get ready for a run's epochs; `name` is its folder's in TensorBoard."""
        # Takes half a second to import, and only those who train need it.
        from tensorboardX import SummaryWriter

        known = self._tracker.points(run_id)
        with self._lock:
            self._known[run_id] = known
            self._boards[run_id] = SummaryWriter(str(self._folder / name), flush_secs=1)

    def note(self, run_id: str, record: Record) -> None:
        """Take an epoch of a run that was opened, or what was measured of it later."""
        epoch = int(record["epoch"])
        with self._lock:
            known = self._known[run_id]
            new = {k: v for k, v in record.items() if k != "epoch" and (epoch, k) not in known}
            known.update((epoch, name) for name in new)
            if new:
                self._waiting[run_id].append({"epoch": epoch, **new})

    def write(self) -> None:
        """Write what waits; what cannot be written goes on waiting."""
        with self._lock:
            waiting, self._waiting = self._waiting, defaultdict(list)
        for run_id in list(waiting):
            try:
                self._tracker.log(run_id, history=waiting[run_id])
            except BaseException:
                with self._lock:
                    for other, records in waiting.items():
                        self._waiting[other][:0] = records
                raise
            self._draw(run_id, waiting.pop(run_id))

    def close(self) -> None:
        """Write the rest.

        Raises:
            Exception: MLflow still refuses it.
        """
        try:
            self.write()
        finally:
            for board in self._boards.values():
                board.close()

    def _draw(self, run_id: str, records: list[Record]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        writer = self._boards[run_id].file_writer
        for record in records:  # one event each: rounds of small models come by the hundred
            values = [
                Summary.Value(tag=name, simple_value=value)
                for name, value in record.items()
                if name != "epoch"
            ]
            writer.add_summary(Summary(value=values), int(record["epoch"]))


@contextmanager
def recording(tracker: Tracker, folder: Path) -> Iterator[Recorder]:
    """Write epochs for as long as the block lasts.

    Args:
        tracker: of the runs.
        folder: of TensorBoard's files: `tensorboard --logdir FOLDER` shows them.

    Raises:
        Exception: MLflow refuses what is left at the end. Before, it is tried again each second.
    """
    recorder = Recorder(tracker, folder)
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(WRITE_S):
            try:
                recorder.write()
            except Exception:  # noqa: BLE001, S112 - `close` tries once more, and tells
                continue

    thread = threading.Thread(target=work, name="minga-recording", daemon=True)
    thread.start()
    try:
        yield recorder
    finally:
        ended.set()
        thread.join()
        recorder.close()
