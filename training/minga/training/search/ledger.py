"""The files of a search: what a search that was killed at any point goes on from.

Each trial has an entry, written before it begins and when it ends, and a file with the learner
that its own process writes after each epoch. Nothing is kept in Tune's own snapshots: those are
taken every few seconds, so that what ended in between would be done again.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from minga.federation.durable import replacing
from minga.training.document import Document
from minga.training.history import Record
from minga.training.space import Param, Params

EntryStatus = Literal["running", "finished", "stopped", "diverged", "failed"]


class Entry(Document):
    """A trial, or the part of one that is a generation of population based training."""

    number: int
    generation: int = 0
    params: dict[str, Param]
    before: tuple[Record, ...] = ()
    """The epochs behind it when it began: those of the trial whose weights it took over."""
    source: int = 0
    """Whose weights of the generation before it took over; 0: it began anew."""
    records: tuple[Record, ...] = ()
    """Its own epochs."""
    status: EntryStatus = "running"

    @property
    def history(self) -> tuple[Record, ...]:
        """All epochs behind its weights."""
        return self.before + self.records

    @property
    def learner(self) -> str:
        """The file that its process keeps its learner in."""
        return f"trial-{self.number}-{self.generation}.pt"

    @property
    def campaign(self) -> str:
        """The file that its process keeps its campaign in, if it is one."""
        return f"trial-{self.number}.safetensors"


class Ledger:
    """The entries of one search, in its folder. One process writes it at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def read(self) -> list[Entry]:
        """Give all entries by generation and number."""
        entries = [Entry.read(file) for file in self._folder.glob("trial-*.json")]
        return sorted(entries, key=lambda entry: (entry.generation, entry.number))

    def write(self, entry: Entry, *, durably: bool = True) -> None:
        """Keep an entry, in the place of an earlier one of the same trial and generation.

        Args:
            entry: of the trial.
            durably: also over a power cut, which costs some milliseconds.
        """
        name = f"trial-{entry.number}-{entry.generation}.json"
        self._put(name, entry.model_dump_json(), durably=durably)

    def forget_learners(self, generation: int) -> None:
        """Delete the learners of a generation that nobody goes on from."""
        for file in self._folder.glob(f"trial-*-{generation}.pt"):
            file.unlink(missing_ok=True)

    @property
    def seconds(self) -> float:
        """The time that was spent on the search so far."""
        file = self._folder / "seconds"
        return float(file.read_text(encoding="utf-8")) if file.exists() else 0.0

    @seconds.setter
    def seconds(self, value: float) -> None:
        self._put("seconds", str(value))

    def points(self, proposed: Sequence[Params]) -> list[dict[str, Param]]:
        """Give the points to try first: those that were proposed when the search began."""
        file, adapter = self._folder / "points.json", TypeAdapter(list[dict[str, Param]])
        if not file.exists():
            self._put(file.name, adapter.dump_json([dict(point) for point in proposed]).decode())
        return adapter.validate_json(file.read_bytes())

    def _put(self, name: str, text: str, *, durably: bool = True) -> None:
        with replacing(self._folder / name, durably=durably) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
