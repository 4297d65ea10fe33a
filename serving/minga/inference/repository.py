"""The models that a server answers for, exchanged while requests flow.

The set of versions is declared as a whole, and replaced in one assignment after everything
new has been loaded and self-tested. A request keeps the `OnnxModel` it was given, so it ends
on the version it began with; a version that is gone is freed with its last request.

A model that is declared may be unloaded for a time: it takes no memory and answers nothing,
until it is loaded again, in the versions that are declared by then.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from reprlib import repr as excerpt  # a caller must not choose a message's length

from minga.inference.engine import ModelRef, OnnxModel
from minga.inference.errors import ModelError, UnavailableError, UnknownModelError


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
    """

    def __init__(self, *, num_threads: int = 1) -> None:
        self._num_threads = num_threads
        self._changing = threading.Lock()
        self._prepared: dict[ModelRef, OnnxModel] = {}
        # Never changed in place: a reader sees the set from before or from after.
        self._served: Mapping[str, Mapping[str, OnnxModel]] = {}
        self._declared: tuple[ModelRef, ...] = ()
        self._unloaded: frozenset[str] = frozenset()

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """The versions being served, each model's default first."""
        return tuple(model.ref for model in self.served())

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

    def names(self) -> tuple[str, ...]:
        """Name the models being served."""
        return tuple(self._served)

    def versions(self, name: str) -> tuple[str, ...]:
        """Name a model's versions, the default first.

        Raises:
            UnknownModelError: no such model is served.
            UnavailableError: nothing is served yet.
        """
        return tuple(self._versions(name))

    def get(self, name: str, version: str | None = None) -> OnnxModel:
        """Give a version of a model, by default the one that its name stands for.

        Raises:
            UnknownModelError: no such model or version is served.
            UnavailableError: nothing is served yet.
        """
        versions = self._versions(name)
        if version is None:
            return next(iter(versions.values()))
        try:
            return versions[version]
        except KeyError:
            raise UnknownModelError(
                f"model '{name}' has no version {excerpt(version)} here, only {', '.join(versions)}"
            ) from None

    def index(self) -> tuple[IndexEntry, ...]:
        """List the declared versions."""
        unloaded = self._unloaded
        return tuple(
            IndexEntry(name=ref.name, version=ref.version, is_loaded=ref.name not in unloaded)
            for ref in self._declared
        )

    def served(self) -> tuple[OnnxModel, ...]:
        """Give all versions that answer."""
        return tuple(model for versions in self._served.values() for model in versions.values())

    def prepare(self, refs: Iterable[ModelRef]) -> None:
        """Load and self-test versions without serving them yet, so that `apply` cannot fail.

        What was prepared before and never applied is forgotten.

        Raises:
            ModelError: one of them cannot be served; nothing has changed.
        """
        with self._changing:
            self._prepared = self._load(ref for ref in refs if ref.name not in self._unloaded)

    def apply(self, refs: Iterable[ModelRef]) -> None:
        """Serve exactly these versions; of a model's versions the first is its default.

        Raises:
            ModelError: one of them cannot be served; the set from before goes on serving.
        """
        with self._changing:
            self._exchange(tuple(refs), self._unloaded)

    def unload(self, name: str) -> None:
        """Let a model answer no more until it is loaded again; its running requests end.

        Raises:
            UnknownModelError: no such model is declared.
        """
        with self._changing:
            self._require(name)
            self._exchange(self._declared, self._unloaded | {name})

    def load(self, name: str) -> None:
        """Let a declared model answer again; one that answers already is left as it is.

        Raises:
            UnknownModelError: no such model is declared.
            ModelError: it cannot be served any more; it stays unloaded.
        """
        with self._changing:
            self._require(name)
            self._exchange(self._declared, self._unloaded - {name})

    def _exchange(self, declared: tuple[ModelRef, ...], unloaded: frozenset[str]) -> None:
        wanted = [ref for ref in declared if ref.name not in unloaded]
        served: dict[str, dict[str, OnnxModel]] = {}
        for ref, model in self._load(wanted).items():
            versions = served.setdefault(ref.name, {})
            if ref.version in versions:
                raise ModelError(f"model {ref} is listed twice with different files")
            versions[ref.version] = model
        self._unloaded = unloaded & {ref.name for ref in declared}
        self._declared = declared
        self._served = served
        self._prepared = {}

    def _require(self, name: str) -> None:
        if name not in {ref.name for ref in self._declared}:
            raise UnknownModelError(f"no model {excerpt(name)} is declared here")

    def _versions(self, name: str) -> Mapping[str, OnnxModel]:
        served = self._served
        try:
            return served[name]
        except KeyError:
            if not self._declared:
                raise UnavailableError("no model is loaded yet; try again shortly") from None
            if name in self._unloaded:
                raise UnknownModelError(f"model '{name}' is unloaded; load it first") from None
            raise UnknownModelError(
                f"no model {excerpt(name)} here, only {', '.join(sorted(served))}"
            ) from None

    def _load(self, refs: Iterable[ModelRef]) -> dict[ModelRef, OnnxModel]:
        """Load what is neither served nor prepared; the rest is kept as it is."""
        known = self._prepared | {model.ref: model for model in self.served()}
        return {
            ref: known.get(ref) or OnnxModel.load(ref, num_threads=self._num_threads)
            for ref in refs
        }
