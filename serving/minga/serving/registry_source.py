"""The MLflow model registry as a source of models: the version that an alias names.

Of a version only four things matter here: its `source` (the folder of its files), the file
`model.onnx` in it, the tag `minga.onnx_sha256`, which is what may be loaded, and the means of the
training data in `profile.json`, by which answers are explained.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

# MLflow reads these when it is imported: send nothing anywhere, and give up on a registry
# that is away within seconds, for the watcher asks again anyway.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

import mlflow.artifacts
import orjson
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_DOES_NOT_EXIST,
    ErrorCode,
)
from mlflow.utils import get_results_from_paginated_fn
from sqlalchemy.exc import SQLAlchemyError

from minga.inference.engine import ModelRef
from minga.inference.uris import local_path, redacted, scrubbed
from minga.serving.book import RegistryBook
from minga.serving.errors import NoChampionError, RegistryUnreachableError, ServingError

_MODEL_FILE: Final = "model.onnx"
_PROFILE_FILE: Final = "profile.json"
_DIGEST_TAG: Final = "minga.onnx_sha256"
_BLESSED_TAG: Final = "minga.blessed"
_PAGE: Final = 1000  # models that MLflow is asked for at a time, its most
_MISSING: Final = ErrorCode.Name(RESOURCE_DOES_NOT_EXIST)
_INVALID: Final = ErrorCode.Name(INVALID_PARAMETER_VALUE)


class RegistrySource:
    """A `ModelSource` over one registry.

    Files on this machine are read where they lie; others are downloaded once per version.

    Args:
        tracking_uri: of MLflow, such as `sqlite:////path/mlflow.db`.
        alias: which version of a model is meant.
        pins: for a model of which another is meant: its number, or "@" and an alias.
        downloads: where files that lie elsewhere are kept; by default for this object's life.

    Raises:
        NoChampionError: there is no registry yet.
        RegistryUnreachableError: the registry does not answer.
    """

    def __init__(
        self,
        tracking_uri: str,
        *,
        alias: str = "champion",
        pins: Mapping[str, str] | None = None,
        downloads: Path | None = None,
    ) -> None:
        self._uri = tracking_uri
        self._alias = alias
        self._pins = dict(pins or {})
        self._refs: dict[tuple[str, str], ModelRef] = {}
        self._temporary = tempfile.TemporaryDirectory(prefix="minga-models-")
        self._downloads = downloads or Path(self._temporary.name)
        database = _sqlite_file(tracking_uri)
        if database is not None and not database.is_file():  # MLflow would make an empty one
            raise NoChampionError(
                f"no model is registered yet ({database} does not exist): `minga run` makes one"
            )
        try:
            self._client = MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise self._unreachable(error) from error

    def names(self) -> tuple[str, ...]:
        """Name the models that have a version with the alias.

        Raises:
            RegistryUnreachableError: the registry does not answer.
        """
        try:
            models = get_results_from_paginated_fn(
                lambda most, token: self._client.search_registered_models(
                    max_results=most, page_token=token
                ),
                _PAGE,
            )
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise self._unreachable(error) from error
        return tuple(sorted(model.name for model in models if self._alias in model.aliases))

    def current(self, name: str) -> ModelRef | None:
        """Give the version that the alias, or the model's pin, names; None if there is none.

        Raises:
            RegistryUnreachableError: the registry does not answer.
            ServingError: the version has no ONNX model that could be checked.
        """
        pin = self._pins.get(name, f"@{self._alias}")
        try:
            return self.version(name, pin)
        except NoChampionError:
            if pin.startswith("@"):
                return None
            raise

    def version(self, name: str, which: str) -> ModelRef:
        """Give a version by its number, or by "@" and an alias.

        Raises:
            NoChampionError: there is none.
            RegistryUnreachableError: the registry does not answer.
            ServingError: the version has no ONNX model that could be checked.
        """
        try:
            version: str | None = which
            if which.startswith("@"):
                version = self._client.get_registered_model(name).aliases.get(which[1:])
            if version is not None:
                return self._version(name, version)
        except (MlflowException, SQLAlchemyError, OSError) as error:
            # MLflow says that a version which is no number is an invalid parameter.
            if getattr(error, "error_code", None) not in (_MISSING, _INVALID):
                raise self._unreachable(error) from error
        raise NoChampionError(
            f"model '{name}' has no version {which}; see what there is with: minga model list"
        )

    def is_blessed(self, ref: ModelRef) -> bool:
        """Tell whether a version passed its gates.

        Raises:
            RegistryUnreachableError: the registry does not answer.
        """
        try:
            tags = self._client.get_model_version(ref.name, ref.version).tags
        except (MlflowException, SQLAlchemyError, OSError) as error:
            raise self._unreachable(error) from error
        return bool(tags.get(_BLESSED_TAG) == "true")

    def book(self) -> RegistryBook:
        """Give the book of the traffic's plans and stories in this registry."""
        return RegistryBook(
            self._client,
            unreachable=self._unreachable,
            errors=(MlflowException, SQLAlchemyError, OSError),
        )

    def _version(self, name: str, version: str) -> ModelRef:
        if (name, version) not in self._refs:
            self._refs[name, version] = self._ref(self._client.get_model_version(name, version))
        return self._refs[name, version]

    def _ref(self, found: Any) -> ModelRef:
        digest = found.tags.get(_DIGEST_TAG)
        if digest is None:
            raise ServingError(
                f"model '{found.name}' version {found.version} has no tag {_DIGEST_TAG}: "
                "it was not registered by Minga; `minga run` registers one that can be served"
            )
        return ModelRef(
            name=found.name,
            version=str(found.version),
            path=str(self._fetch(found, _MODEL_FILE)),
            sha256=digest,
            baseline=self._baseline(found),
        )

    def _baseline(self, found: Any) -> tuple[float, ...]:
        """Read the means of the training data, without which a version is served all the same."""
        try:
            profile = orjson.loads(self._fetch(found, _PROFILE_FILE).read_bytes())
            means = tuple(float(column["mean"]) for column in profile["inputs"])
        except (OSError, MlflowException, ValueError, KeyError, TypeError):
            return ()
        return means if all(map(math.isfinite, means)) else ()

    def _fetch(self, found: Any, file: str) -> Path:
        folder = local_path(found.source)
        if folder is not None:
            return folder / file
        target = self._downloads / found.name / str(found.version)
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=f"{found.source.rstrip('/')}/{file}",
                dst_path=str(target),
                tracking_uri=self._uri,
            )
        )

    def _unreachable(self, error: Exception) -> RegistryUnreachableError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return RegistryUnreachableError(
            f"the model registry at {redacted(self._uri)} does not answer "
            f"({scrubbed(reason, self._uri)}): "
            "is MINGA_TRACKING_URI right, and is its server up?"
        )


def parse_pins(words: Iterable[str]) -> dict[str, str | None]:
    """Read which models and versions are meant: `NAME`, `NAME@ALIAS` or `NAME/VERSION`.

    Returns:
        By model, its pin as `RegistrySource` takes it; None where there is none.

    Raises:
        ServingError: a word is none of these, or names a model again.
    """
    pins: dict[str, str | None] = {}
    for word in words:
        name, slash, version = word.partition("/")
        pin: str | None = version
        if not slash:
            name, at, alias = word.partition("@")
            pin = at + alias if at else None
        if not name or pin in ("", "@") or name in pins:
            raise ServingError(
                f"{word!r} names no model, or one again; write NAME, NAME@ALIAS or NAME/VERSION"
            )
        pins[name] = pin
    return pins


def _sqlite_file(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)) if uri.startswith(prefix) else None
