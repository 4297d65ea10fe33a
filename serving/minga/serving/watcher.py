"""Follows where models come from, and deploys what changes."""

import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Protocol

from minga.inference.comparing import Comparison
from minga.inference.engine import ModelRef
from minga.inference.errors import ModelError, OverloadedError
from minga.serving.counting import CountBook, ReplicaCounts
from minga.serving.errors import NoChampionError, ServingError, VersionRefusedError
from minga.serving.referee import Lineup, Referee

_LOG: Final = logging.getLogger(__name__)


class ModelSource(Protocol):
    """Says which version of a model is to be served."""

    def current(self, name: str) -> ModelRef | None:
        """Give the version to serve now; None if there is none yet.

        Raises:
            ServingError: the source cannot tell.
        """
        ...


class MemorySource:
    """A source that is told by its owner, for models that are in no registry."""

    def __init__(self, refs: Iterable[ModelRef] = ()) -> None:
        self._refs = {ref.name: ref for ref in refs}

    def set(self, ref: ModelRef) -> None:
        """Let this version be the one to serve of its model."""
        self._refs[ref.name] = ref

    def current(self, name: str) -> ModelRef | None:
        """Give the version that was told last; None if none was."""
        return self._refs.get(name)


def current_versions(source: ModelSource, names: Iterable[str]) -> tuple[ModelRef, ...]:
    """Give the version to serve of each of these models.

    Raises:
        NoChampionError: there is no model, or one has no version yet.
        ServingError: the source cannot tell.
    """
    refs = {name: source.current(name) for name in names}
    if not refs:
        raise NoChampionError("no model has a champion yet: `minga run` makes one")
    for name, ref in refs.items():
        if ref is None:
            raise NoChampionError(f"model '{name}' has no champion yet: `minga run` makes one")
    return tuple(ref for ref in refs.values() if ref is not None)


class Host(Protocol):
    """Serves what it is told."""

    def deploy(self, refs: Sequence[ModelRef], comparisons: Sequence[Comparison] = ()) -> None:
        """Serve exactly these versions, of each model the default first.

        Raises:
            ModelError: one of them cannot be served; nothing has changed.
            VersionRefusedError: the same, told by a replica.
            ServingError: it did not work, and may another time.
        """
        ...

    def counts(self) -> Iterable[ReplicaCounts]:
        """Give what each replica has counted of the comparisons since they began.

        Raises:
            ServingError: it cannot be told now.
        """
        ...


class Watcher:
    """Keeps what is served equal to what the source says, and the referee of comparisons.

    What is refused stays refused until something else is wanted: it is not tried again each
    second, and what was served before goes on being served. A source that cannot tell, or
    that names no version any more, changes nothing.

    Args:
        source: what is asked.
        served: the versions that are served now; their models are followed.
        host: where it is made so.
        referee: says which versions are compared; without one the champion takes all.
    """

    def __init__(
        self,
        source: ModelSource,
        served: Iterable[ModelRef],
        host: Host,
        referee: Referee | None = None,
    ) -> None:
        self._source = source
        self._served = {ref.name: Lineup(default=ref) for ref in served}
        self._champions: dict[str, ModelRef] = {}
        self._host = host
        self._referee = referee
        self._counts = CountBook()
        self._refused: dict[str, Lineup] = {}
        self._complaints: dict[str, str] = {}

    @property
    def served(self) -> tuple[ModelRef, ...]:
        """The versions that are served now."""
        return _refs(self._served)

    def check(self) -> None:
        """Ask once, and deploy what has changed, one model after the other."""
        if self._referee is not None and self._referee.is_comparing():
            self._count()
        for name, lineup in tuple(self._served.items()):
            try:
                wanted = self._wanted(name, lineup)
            except ServingError as error:
                self._complain(name, str(error))
                continue
            if wanted not in (lineup, self._refused.get(name)):
                self._swap(name, wanted)

    def run(
        self,
        stop: threading.Event,
        interval_s: float,
        on_served: Callable[[Sequence[ModelRef]], None] | None = None,
    ) -> None:
        """Check at an interval until told to stop.

        Args:
            stop: ends it.
            interval_s: between two looks.
            on_served: hears what is served, at first and after each look.
        """
        while True:
            if on_served is not None:
                on_served(self.served)
            if stop.wait(interval_s):
                return
            self.check()

    def _wanted(self, name: str, lineup: Lineup) -> Lineup:
        """Say what a model's lineup should be; a source that is away does not stop a referee."""
        try:
            champion = self._source.current(name)
            self._complaints.pop(name, None)
        except ServingError as error:
            if self._referee is None:
                raise
            self._complain(name, str(error))
            champion = None
        champion = champion or self._champions.get(name, lineup.default)
        self._champions[name] = champion
        if self._referee is None:
            return Lineup(default=champion)
        return self._referee.look(champion, lineup.default, self._counts.total())

    def _count(self) -> None:
        try:
            self._counts.update(self._host.counts())
        except ServingError as error:
            _LOG.warning("what is compared is not counted now: %s", error)

    def _swap(self, name: str, wanted: Lineup) -> None:
        lineups = self._served | {name: wanted}
        comparisons = [each.comparison for each in lineups.values() if each.comparison]
        try:
            self._host.deploy(_refs(lineups), comparisons)
        except (ModelError, VersionRefusedError) as error:
            self._refused[name] = wanted
            if self._referee is not None and wanted.comparison is not None:
                self._referee.refused(name, str(error))
            _LOG.error("refused: %s", error)
        except (ServingError, OverloadedError) as error:  # it may work at the next look
            _LOG.error("cannot deploy model '%s': %s", name, error)
        else:
            self._served = lineups
            self._refused.pop(name, None)
            self._counts.keep({each.id for each in comparisons})
            _LOG.info("serving model %s", " beside ".join(map(str, wanted.refs)))

    def _complain(self, name: str, complaint: str) -> None:
        """Log once, not each second, why the source cannot tell."""
        if self._complaints.get(name) != complaint:
            _LOG.warning("%s; what is served now goes on being served", complaint)
        self._complaints[name] = complaint


def _refs(lineups: Mapping[str, Lineup]) -> tuple[ModelRef, ...]:
    return tuple(ref for lineup in lineups.values() for ref in lineup.refs)
