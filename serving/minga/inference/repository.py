"""The models that a server answers for, exchanged while requests flow.

The set of versions is declared as a whole, and replaced in one assignment after everything
new has been loaded and self-tested. A request keeps the `OnnxModel` it was given, so it ends
on the version it began with; a version that is gone is freed with its last request.

A model that is declared may be unloaded for a time: it takes no memory and answers nothing,
until it is loaded again, in the versions that are declared by then.

Where memory is bounded, versions sleep: each has been loaded and tested once, and the least
recently used leave for those that are asked for. One that sleeps is woken by a request, checked
as at first. Nothing is taken from a request that runs: its version gets no new ones, and its
memory is free only when the last one has ended.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as excerpt  # a caller must not choose a message's length
from typing import Final

from minga.inference.engine import ModelRef, OnnxModel
from minga.inference.errors import (
    AsleepError,
    InferenceError,
    ModelError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from minga.inference.memory import Memory, trim
from minga.inference.statistics import Statistics

_ROOM_S: Final = 10.0
"""How long who wakes a version waits for running requests to give memory back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """A declared version, and whether it answers."""

    name: str
    version: str
    is_loaded: bool


class ModelRepository:
    """Versions of models by name.

    Reading is lock-free and may happen on any thread; what changes the set takes turns.

    Args:
        num_threads: onnxruntime's threads for one run of a model.
        max_bytes: the memory that versions may take together, counted by the sizes of their
            files; None means all of them stay.
    """

    def __init__(self, *, num_threads: int = 1, max_bytes: int | None = None) -> None:
        self._num_threads = num_threads
        self._changing = threading.Lock()
        self._memory = Memory(max_bytes)
        self._prepared: dict[ModelRef, OnnxModel] = {}
        # Never changed in place: a reader sees the set from before or from after.
        self._awake: Mapping[ModelRef, OnnxModel] = {}
        self._routes: Mapping[tuple[str, str | None], OnnxModel] = {}
        self._declared: tuple[ModelRef, ...] = ()
        self._unloaded: frozenset[str] = frozenset()
        # Of each version that was loaded: it may sleep, and what it did is not forgotten.
        self._statistics: dict[ModelRef, Statistics] = {}

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """The versions that answer, each model's default first."""
        return tuple(ref for ref in self._declared if ref.name not in self._unloaded)

    @property
    def declared(self) -> tuple[ModelRef, ...]:
        """The versions that were given to `apply` last, unloaded ones included."""
        return self._declared

    @property
    def unloaded(self) -> frozenset[str]:
        """The declared models that are unloaded."""
        return self._unloaded

    @property
    def is_ready(self) -> bool:
        """Whether there is any model, if only to be loaded again."""
        return bool(self._declared)

    @property
    def num_awakened(self) -> int:
        """How often a version was woken by a request."""
        return self._memory.num_awakened

    @property
    def num_evicted(self) -> int:
        """How often a version was put to sleep for another."""
        return self._memory.num_evicted

    def names(self) -> tuple[str, ...]:
        """Name the models that answer."""
        return tuple(dict.fromkeys(ref.name for ref in self.refs))

    def versions(self, name: str) -> tuple[str, ...]:
        """Name a model's versions, the default first.

        Raises:
            UnknownModelError: no such model answers.
            UnavailableError: nothing is served yet.
        """
        return tuple(ref.version for ref in self.find(name))

    def get(self, name: str, version: str | None = None) -> OnnxModel:
        """Give a version of a model, by default the one that its name stands for.

        Raises:
            AsleepError: it answers once it was woken.
            UnknownModelError: no such model or version answers.
            UnavailableError: nothing is served yet.
        """
        try:
            return self._routes[name, version]
        except KeyError:
            ref = self.find(name, version)[0]
            raise AsleepError(f"model {ref} is not in memory; try again shortly") from None

    def find(self, name: str, version: str | None = None) -> tuple[ModelRef, ...]:
        """Give the versions of a model that answer, the default first, or one of them.

        Raises:
            UnknownModelError: no such model or version answers.
            UnavailableError: nothing is served yet.
        """
        refs = self.refs
        found = tuple(ref for ref in refs if ref.name == name)
        if not found:
            if not self._declared:
                raise UnavailableError("no model is loaded yet; try again shortly")
            if name in self._unloaded:
                raise UnknownModelError(f"model '{name}' is unloaded; load it first")
            others = ", ".join(sorted({ref.name for ref in refs}))
            raise UnknownModelError(f"no model {excerpt(name)} here, only {others}")
        if version is None:
            return found
        one = tuple(ref for ref in found if ref.version == version)
        if not one:
            raise UnknownModelError(
                f"model '{name}' has no version {excerpt(version)} here, "
                f"only {', '.join(ref.version for ref in found)}"
            )
        return one

    def statistics(self, ref: ModelRef) -> Statistics:
        """Give what a version has done, be it awake or asleep."""
        return self._statistics.get(ref) or Statistics()

    def index(self) -> tuple[IndexEntry, ...]:
        """List the declared versions."""
        unloaded = self._unloaded
        return tuple(
            IndexEntry(name=ref.name, version=ref.version, is_loaded=ref.name not in unloaded)
            for ref in self._declared
        )

    def awake(self) -> tuple[OnnxModel, ...]:
        """Give the versions that are in memory."""
        return tuple(self._awake.values())

    def wake(self, name: str, version: str | None = None) -> OnnxModel:
        """Give a version of a model, loading it if it sleeps; takes as long as that.

        Raises:
            UnknownModelError: no such model or version answers.
            UnavailableError: nothing is served yet.
            OverloadedError: running requests do not give back the memory that it needs.
            ModelError: it cannot be served any more.
        """
        with self._changing:
            try:
                return self.get(name, version)
            except AsleepError:
                (ref, *_) = self.find(name, version)
            model = self._open(ref)
            self._memory.num_awakened += 1
            self._route({**self._awake, ref: model})
            return model

    def prepare(self, refs: Iterable[ModelRef]) -> None:
        """Load and self-test versions without serving them yet, so that `apply` cannot fail.

        What was prepared before and never applied is forgotten.

        Raises:
            ModelError: one of them cannot be served; nothing has changed.
            OverloadedError: running requests do not give back the memory that one needs.
        """
        with self._changing:
            self._forget_prepared()
            self._load([ref for ref in refs if ref.name not in self._unloaded])

    def apply(self, refs: Iterable[ModelRef]) -> None:
        """Serve exactly these versions; of a model's versions the first is its default.

        Raises:
            ModelError: one of them cannot be served; the set from before goes on serving.
            OverloadedError: running requests do not give back the memory that one needs.
        """
        with self._changing:
            self._exchange(tuple(refs), self._unloaded)

    def unload(self, name: str) -> None:
        """Let a model answer no more until it is loaded again; its running requests end.

        Raises:
            UnknownModelError: no such model is declared.
        """
        with self._changing:
            self.require(name)
            self._exchange(self._declared, self._unloaded | {name})

    def load(self, name: str) -> None:
        """Let a declared model answer again; one that answers already is left as it is.

        Raises:
            UnknownModelError: no such model is declared.
            ModelError: it cannot be served any more; it stays unloaded.
        """
        with self._changing:
            self.require(name)
            self._exchange(self._declared, self._unloaded - {name})

    def require(self, name: str) -> None:
        """Check that a model is declared.

        Raises:
            UnknownModelError: it is not.
        """
        if name not in {ref.name for ref in self._declared}:
            raise UnknownModelError(f"no model {excerpt(name)} is declared here")

    def _exchange(self, declared: tuple[ModelRef, ...], unloaded: frozenset[str]) -> None:
        wanted = [ref for ref in dict.fromkeys(declared) if ref.name not in unloaded]
        versions = [(ref.name, ref.version) for ref in wanted]
        for ref, version in zip(wanted, versions, strict=True):
            if versions.count(version) > 1:
                raise ModelError(f"model {ref} is listed twice with different files")
        self._load(wanted)
        loaded = dict(self._awake) | self._prepared
        self._unloaded = unloaded & {ref.name for ref in declared}
        self._declared = declared
        self._statistics = {ref: self._statistics[ref] for ref in wanted}
        self._prepared = {}
        self._route({ref: loaded[ref] for ref in wanted if ref in loaded})

    def _load(self, refs: Iterable[ModelRef]) -> None:
        """Load and test what has not been yet, into `_prepared`; all of it or nothing."""
        try:
            for ref in refs:
                if ref not in self._statistics:
                    self._prepared[ref] = self._open(ref)
        except InferenceError:
            self._forget_prepared()
            raise

    def _forget_prepared(self) -> None:
        self._prepared = {}
        declared = set(self._declared)
        self._statistics = {ref: one for ref, one in self._statistics.items() if ref in declared}

    def _open(self, ref: ModelRef) -> OnnxModel:
        """Load a version once there is room for it."""
        num_bytes = _size_of(ref)
        if not self._memory.could_hold(num_bytes):
            raise ModelError(
                f"model {ref} has {num_bytes} bytes, and all models together may have "
                f"{self._memory.max_bytes}: raise model_memory_mb in [serving]"
            )
        while not self._memory.has_room(num_bytes) and self._put_one_to_sleep():
            pass
        if not self._memory.wait_for_room(num_bytes, _ROOM_S):
            raise OverloadedError(
                f"the models that compute now take all the memory that models may, "
                f"and {ref} is not in it; try again shortly"
            )
        model = OnnxModel.load(ref, num_threads=self._num_threads)
        model.statistics = self._statistics.setdefault(ref, model.statistics)
        model.statistics.wake()
        self._memory.charge(model, num_bytes)
        trim()
        return model

    def _put_one_to_sleep(self) -> bool:
        """Take the least recently used version out of memory; False if there is none."""
        candidates = dict(self._awake) | self._prepared
        if not candidates:
            return False
        eldest = min(candidates, key=lambda ref: candidates[ref].statistics.last_used_s)
        self._prepared.pop(eldest, None)
        self._route({ref: model for ref, model in self._awake.items() if ref != eldest})
        self._memory.num_evicted += 1
        return True

    def _route(self, awake: Mapping[ModelRef, OnnxModel]) -> None:
        """Replace what is in memory, and with it what names stand for."""
        routes: dict[tuple[str, str | None], OnnxModel] = {}
        defaults: set[str] = set()
        for ref in self.refs:
            model = awake.get(ref)
            if model is not None:
                routes[ref.name, ref.version] = model
                if ref.name not in defaults:
                    routes[ref.name, None] = model
            defaults.add(ref.name)
        self._awake = awake
        self._routes = routes


def _size_of(ref: ModelRef) -> int:
    try:
        return Path(ref.path).stat().st_size
    except OSError:
        return 0  # reading it says what is wrong
