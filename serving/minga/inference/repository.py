"""The models that a server answers for, exchanged while requests flow.

The set of versions is declared as a whole, and replaced in one assignment after everything
new has been loaded and self-tested. A request keeps the `OnnxModel` it was given, so it ends
on the version it began with; a version that is gone is freed with its last request.
"""

import threading
from collections.abc import Iterable, Mapping

from minga.inference.engine import ModelRef, OnnxModel
from minga.inference.errors import ModelError, UnavailableError, UnknownModelError


class ModelRepository:
    """Versions of models by name.

    Reading is lock-free and may happen on any thread; `prepare` and `apply` take turns.

    Args:
        num_threads: onnxruntime's threads for one run of a model.
    """

    def __init__(self, *, num_threads: int = 1) -> None:
        self._num_threads = num_threads
        self._changing = threading.Lock()
        self._prepared: dict[ModelRef, OnnxModel] = {}
        # Never changed in place: a reader sees the set from before or from after.
        self._served: Mapping[str, Mapping[str, OnnxModel]] = {}

    @property
    def refs(self) -> tuple[ModelRef, ...]:
        """The versions being served, each model's default first."""
        return tuple(model.ref for versions in self._served.values() for model in versions.values())

    @property
    def is_ready(self) -> bool:
        """Whether there is any model to answer with."""
        return bool(self._served)

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
                f"model '{name}' has no version '{version}' here, only {', '.join(versions)}"
            ) from None

    def prepare(self, refs: Iterable[ModelRef]) -> None:
        """Load and self-test versions without serving them yet, so that `apply` cannot fail.

        What was prepared before and never applied is forgotten.

        Raises:
            ModelError: one of them cannot be served; nothing has changed.
        """
        with self._changing:
            self._prepared = self._load(refs)

    def apply(self, refs: Iterable[ModelRef]) -> None:
        """Serve exactly these versions; of a model's versions the first is its default.

        Raises:
            ModelError: one of them cannot be served; the set from before goes on serving.
        """
        with self._changing:
            served: dict[str, dict[str, OnnxModel]] = {}
            for ref, model in self._load(refs).items():
                versions = served.setdefault(ref.name, {})
                if ref.version in versions:
                    raise ModelError(f"model {ref} is listed twice with different files")
                versions[ref.version] = model
            self._served = served
            self._prepared = {}

    def _versions(self, name: str) -> Mapping[str, OnnxModel]:
        served = self._served
        try:
            return served[name]
        except KeyError:
            if not served:
                raise UnavailableError("no model is loaded yet; try again shortly") from None
            raise UnknownModelError(
                f"no model '{name}' here, only {', '.join(sorted(served))}"
            ) from None

    def _load(self, refs: Iterable[ModelRef]) -> dict[ModelRef, OnnxModel]:
        """Load what is neither served nor prepared; the rest is kept as it is."""
        known = self._prepared | {
            model.ref: model for versions in self._served.values() for model in versions.values()
        }
        return {
            ref: known.get(ref) or OnnxModel.load(ref, num_threads=self._num_threads)
            for ref in refs
        }
