"""Follows where models come from, and deploys what changes."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from minga.inference.engine import ModelRef
from minga.inference.errors import ModelError, OverloadedError
from minga.serving.errors import NoChampionError, ServingError, VersionRefusedError

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


Deploy = Callable[[Sequence[ModelRef]], None]


class Watcher:
    """Keeps what is served equal to what the source says.

    A version that is refused stays refused until the source names another: it is not tried
    again each second, and the one before goes on being served. A source that cannot tell, or
    that names no version any more, changes nothing.

    Args:
        source: what is asked.
        served: the versions that are served now; their models are followed.
        deploy: makes exactly the given versions be served, or raises and changes nothing.
    """

    def __init__(self, source: ModelSource, served: Iterable[ModelRef], deploy: Deploy) -> None:
        self._source = source
        self._served = {ref.name: ref for ref in served}
        self._deploy = deploy
        self._refused: dict[str, ModelRef] = {}
        self._complaints: dict[str, str] = {}

    @property
    def served(self) -> tuple[ModelRef, ...]:
        """The versions that are served now."""
        return tuple(self._served.values())

    def check(self) -> None:
        """Ask the source once, and deploy what has changed, one model after the other."""
        for name in tuple(self._served):
            try:
                wanted = self._source.current(name)
            except ServingError as error:
                self._complain(name, str(error))
                continue
            self._complaints.pop(name, None)
            if wanted and wanted not in (self._served[name], self._refused.get(name)):
                self._swap(wanted)

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

    def _swap(self, wanted: ModelRef) -> None:
        served = self._served | {wanted.name: wanted}
        try:
            self._deploy(tuple(served.values()))
        except (ModelError, VersionRefusedError) as error:
            self._refused[wanted.name] = wanted
            _LOG.error("refused: %s", error)
        except (ServingError, OverloadedError) as error:  # it may work at the next look
            _LOG.error("cannot deploy model %s: %s", wanted, error)
        else:
            self._served = served
            self._refused.pop(wanted.name, None)
            _LOG.info("serving model %s", wanted)

    def _complain(self, name: str, complaint: str) -> None:
        """Log once, not each second, why the source cannot tell."""
        if self._complaints.get(name) != complaint:
            _LOG.warning("%s; what is served now goes on being served", complaint)
        self._complaints[name] = complaint
