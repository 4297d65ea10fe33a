"""The course of a search, without Ray: which trial begins next, which is cut, what came of all.

It lives in the driver and is asked by the scheduler and the searcher that Tune is given. All it
knows comes from the ledger and from the epochs that trials report.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from minga.training.config import SearchConfig
from minga.training.errors import TaskError
from minga.training.history import Record, best_record
from minga.training.search.halving import Halving
from minga.training.search.ledger import Entry, Ledger
from minga.training.search.population import Member, next_generation
from minga.training.search.suggestions import Known, draw, grid, tpe
from minga.training.space import Choice, Params
from minga.training.task import Task
from minga.training.trials import Trial, TrialStatus


class Pause(Enum):
    """Why no trial begins now."""

    LATER = "trials that run decide what comes next"
    OVER = "no further trial will begin"


@dataclass(slots=True)
class Course:
    """One search from here to its end.

    Attributes:
        entries: of all trials that have begun, by generation and number.
        resumed: whether some had begun when this was made.
    """

    task: Task
    config: SearchConfig
    seed: int
    ledger: Ledger
    points: Sequence[Params] = ()
    entries: dict[tuple[int, int], Entry] = field(init=False)
    resumed: bool = field(init=False)
    _first: Sequence[Params] = field(init=False)
    _waiting: list[tuple[int, int]] = field(init=False)
    _halving: Halving | None = field(init=False)
    _began: float = field(init=False)
    _before_s: float = field(init=False)

    def __post_init__(self) -> None:
        defaults = {name: self.task.defaults[name] for name in self.task.search_space}
        self._first = [defaults] + [
            point for point in self.ledger.points(self.points) if point != defaults
        ]
        if self.config.searcher == "grid":
            self._first = self._grid()
        found = self.ledger.read()
        self.resumed = bool(found)
        self.entries = {(entry.generation, entry.number): entry for entry in found}
        # What failed gets another try: something outside of code and data may have stopped it.
        self._waiting = [
            key for key, entry in self.entries.items() if entry.status in ("running", "failed")
        ]
        self._halving = None
        if self.config.scheduler == "halving":
            self._halving = Halving(
                objective=self.task.objective,
                grace_epochs=min(self.config.grace_epochs, self.config.max_epochs),
                reduction_factor=self.config.reduction_factor,
                max_epochs=self.config.max_epochs,
            )
        self._before_s, self._began = self.ledger.seconds, time.monotonic()
        if self._is_spent():
            for entry in found:
                if entry.status == "running":
                    self._keep(entry, status="stopped")

    @property
    def num_trials(self) -> int:
        """How many trials there will be if nothing ends the search early."""
        return len(self._first) if self.config.searcher == "grid" else self.config.num_trials

    @property
    def num_ended(self) -> int:
        """How many trials need no more work."""
        last = self._num_generations - 1
        return sum(e.status != "running" for e in self.entries.values() if e.generation == last)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        running = any(entry.status == "running" for entry in self.entries.values())
        return not running and self.next(peek=True) is Pause.OVER

    def next(self, *, peek: bool = False) -> Entry | Pause:
        """Give the trial that begins now; it is in the ledger before it is given.

        Args:
            peek: only tell whether there would be one; begin none.
        """
        if self._waiting and not self._is_spent():
            entry = self.entries[self._waiting[0]]
            if not peek:
                self._waiting.pop(0)
            return entry if peek else self._keep(entry, status="running")
        if self._is_spent() or self._is_stalled():
            return Pause.OVER
        if len(self._of(0)) < self.num_trials:
            number = len(self._of(0)) + 1
            if peek:
                return Pause.LATER
            return self._begin(Entry(number=number, params=self._suggest(number)))
        return self._next_of_population(peek)

    def note(self, entry: Entry, record: Record) -> bool:
        """Take an epoch of a trial, and tell whether the trial is to stop."""
        key = (entry.generation, entry.number)
        known = self.entries[key]
        if record["epoch"] > len(known.history):
            known = known.model_copy(update={"records": (*known.records, record)})
            self.entries[key] = known
            self.ledger.write(known, durably=False)
        return self._is_spent() or entry.number in self._cuts()

    def end(self, entry: Entry, *, diverged: bool = False, failed: bool = False) -> None:
        """Take the end of a trial."""
        key = (entry.generation, entry.number)
        if key not in self.entries or self.entries[key].status != "running":
            return
        is_whole = len(self.entries[key].history) >= self.until(entry)
        was_told = self._is_spent() or entry.number in self._cuts()
        if not (is_whole or was_told or diverged or failed):
            return  # somebody stopped the search
        status = "finished" if is_whole else "stopped"
        status = "failed" if failed else "diverged" if diverged else status
        self._keep(self.entries[key], status=status)
        self.ledger.seconds = self._seconds()

    def until(self, entry: Entry) -> int:
        """Give the epoch after which a trial, or its generation, ends by itself."""
        if self.config.scheduler != "population":
            return self.config.max_epochs
        until = (entry.generation + 1) * self.config.perturbation_epochs
        return min(until, self.config.max_epochs)

    def trials(self) -> tuple[Trial, ...]:
        """Give what came of each trial so far, by number."""
        cuts = self._cuts()
        last = {entry.number: entry for entry in self.entries.values()}
        return tuple(self._trial(last[number], cuts.get(number)) for number in sorted(last))

    def _trial(self, entry: Entry, cut: int | None) -> Trial:
        history = entry.history[:cut]
        best = best_record(history, self.task.objective)
        status: TrialStatus
        match entry.status:
            case "diverged" | "failed":
                status = entry.status
            case _:
                status = "finished" if len(history) >= self.config.max_epochs else "cut"
        return Trial(
            number=entry.number,
            params={**self.task.defaults, **entry.params},
            metrics={name: value for name, value in best.items() if name != "epoch"},
            epochs=len(history),
            status=status,
            history=history,
        )

    @property
    def _num_generations(self) -> int:
        if self.config.scheduler != "population":
            return 1
        return math.ceil(self.config.max_epochs / self.config.perturbation_epochs)

    def _of(self, generation: int) -> list[Entry]:
        return [entry for key, entry in self.entries.items() if key[0] == generation]

    def _next_of_population(self, peek: bool) -> Entry | Pause:
        """Give a member of the generation after the last whole one."""
        for generation in range(1, self._num_generations):
            before, now = self._of(generation - 1), self._of(generation)
            if any(entry.status == "running" for entry in before):
                return Pause.LATER
            if len(now) < len(before):
                if peek:
                    return Pause.LATER
                return self._begin(self._successor(before, len(now), generation))
        return Pause.OVER

    def _successor(self, before: list[Entry], place: int, generation: int) -> Entry:
        metric = self.task.objective.metric
        sound = {e.number: e for e in before if e.status == "finished"}
        members = next_generation(
            [Member(number=e.number, source=e.number, params=e.params) for e in before],
            {number: e.history[-1].get(metric, math.nan) for number, e in sound.items()},
            space=self.task.search_space,
            objective=self.task.objective,
            seed=self.seed,
            generation=generation,
        )
        member = members[place]
        source = sound.get(member.source)
        return Entry(
            number=member.number,
            generation=generation,
            params=dict(member.params),
            source=member.source if source else 0,
            before=source.history if source else (),
        )

    def _begin(self, entry: Entry) -> Entry:
        self.ledger.forget_learners(entry.generation - 2)
        return self._keep(entry)

    def _keep(self, entry: Entry, **changes: object) -> Entry:
        entry = entry.model_copy(update=changes)
        self.entries[entry.generation, entry.number] = entry
        self.ledger.write(entry)
        return entry

    def _suggest(self, number: int) -> dict[str, bool | int | float | str]:
        if number <= len(self._first):
            return dict(self._first[number - 1])
        space, objective = self.task.search_space, self.task.objective
        if self.config.searcher == "random":
            return draw(space, self.seed, number)
        known = []
        for trial in self.trials():
            value = trial.metrics.get(objective.metric, objective.worst)
            is_running = self.entries[0, trial.number].status == "running"
            known.append(Known(params=trial.params, value=None if is_running else value))
        return tpe(space, objective, self.seed + number, known, self.config.num_trials)

    def _grid(self) -> list[Params]:
        points = grid(self.task.search_space, self.config.grid_points)
        if len(points) > self.config.num_trials:
            ranges = sum(not isinstance(d, Choice) for d in self.task.search_space.values())
            raise TaskError(
                f"the grid has {len(points)} points but search.num_trials = "
                f"{self.config.num_trials}; raise it"
                + (", or lower search.grid_points" if ranges else "")
            )
        return list(points)

    def _cuts(self) -> dict[int, int]:
        if self._halving is None:
            return {}
        metric = self.task.objective.metric
        values = {
            entry.number: [record.get(metric, math.nan) for record in entry.history]
            for entry in self._of(0)
        }
        ended = {entry.number for entry in self._of(0) if entry.status != "running"}
        return self._halving.cuts(values, ended)

    def _is_stalled(self) -> bool:
        """Tell whether the last `patience` trials, all before them having ended, gained nothing."""
        if self.config.patience == 0 or self.config.scheduler == "population":
            return False
        best, since = self.task.objective.worst, 0
        for trial in self.trials():
            if self.entries[0, trial.number].status == "running":
                break
            value = trial.metrics.get(self.task.objective.metric, self.task.objective.worst)
            gained = self.task.objective.gain(value, best) > 0
            best, since = (value, 0) if gained else (best, since + 1)
        return since >= self.config.patience

    def _seconds(self) -> float:
        return self._before_s + time.monotonic() - self._began

    def _is_spent(self) -> bool:
        return 0 < self.config.budget_s <= self._seconds()
