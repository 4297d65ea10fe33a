"""What runs in each replica of the Ray Serve application.

A replica hosts the ASGI application of `minga.inference` and nothing in front of it. All models
are in the one application, so a URL names a model and not a deployment, and a version is
exchanged inside the replica by `user_config`, which restarts nothing.

A rollout has two steps. `prepare` is sent to every replica: each loads and tests the new
versions, and says if it cannot. Only then is the new `user_config` declared, and `reconfigure`
swaps what is loaded already. A replica that starts later, or again, loads what is declared.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final, TypedDict

from ray import serve
from ray.serve import Application

from minga.inference.access import Protection
from minga.inference.app import InferenceApp
from minga.inference.engine import ModelRef
from minga.inference.errors import ForbiddenError, ModelError
from minga.inference.grpc_server import GrpcServer
from minga.inference.limits import Limits
from minga.inference.repository import ModelRepository

APPLICATION: Final = "minga"
DEPLOYMENT: Final = "InferenceReplica"
IMPORT_PATH: Final = "minga.serving.application:build"
_REGISTRY_DECIDES: Final = (
    "on Ray Serve the registry's aliases say which models are served; "
    "`minga serve --engine local` lets callers load and unload"
)

_LOG: Final = logging.getLogger("ray.serve")  # the only one whose lines reach the replica's log


class UserConfig(TypedDict):
    """What Ray Serve hands to `reconfigure`: plain values, as a Serve config file holds them."""

    models: list[dict[str, Any]]


def user_config(refs: Sequence[ModelRef]) -> UserConfig:
    """Write versions as a user config; of a model's versions the first is its default."""
    return {"models": [asdict(ref) | {"baseline": list(ref.baseline)} for ref in refs]}


class GrpcAddress(TypedDict):
    """Where replicas listen for gRPC."""

    host: str
    port: int


class RegistryControl:
    """Refuses: one replica that is asked cannot speak for the others, nor for those to come."""

    async def load(self, name: str) -> None:
        """Refuse, with the reason."""
        raise ForbiddenError(f"cannot load {name!r}: {_REGISTRY_DECIDES}")

    async def unload(self, name: str) -> None:
        """Refuse, with the reason."""
        raise ForbiddenError(f"cannot unload {name!r}: {_REGISTRY_DECIDES}")


class InferenceReplica:
    """One process that answers for all models.

    gRPC comes straight to the replica, on a port that all replicas of a machine share: Ray
    Serve's own proxy for it listens on every interface and passes each message through pickle.

    Args:
        limits: what callers are granted.
        grpc: where to listen for gRPC; None means nowhere.
        protection: who is let in, and gRPC's TLS; that of HTTP is Ray Serve's proxy's.
    """

    def __init__(
        self, limits: Limits, grpc: GrpcAddress | None = None, protection: Protection | None = None
    ) -> None:
        protection = protection or Protection()
        self._repository = ModelRepository()
        self._app = InferenceApp(
            self._repository, limits=limits, control=RegistryControl(), access=protection.access()
        )
        self._grpc = (
            GrpcServer(self._app.service, **grpc, shared=True, tls=protection.tls())
            if grpc
            else None
        )

    def __serve_build_asgi_app__(self) -> InferenceApp:
        """Give the application that takes this replica's requests."""
        return self._app

    async def prepare(self, config: UserConfig) -> str | None:
        """Load versions without serving them yet; give the reason if one is refused."""
        try:
            await asyncio.to_thread(self._repository.prepare, _refs(config))
        except ModelError as error:
            return str(error)
        return None

    async def reconfigure(self, config: UserConfig) -> None:
        """Serve what is declared.

        A replica that serves already never fails here, because Ray Serve would stop it, and
        with it the versions that are good. A new replica does, so that it is not used.
        """
        try:
            await asyncio.to_thread(self._repository.apply, _refs(config))
        except ModelError:
            if not self._repository.is_ready:
                raise
            _LOG.exception("the declared versions are refused; the old ones go on being served")
        if self._grpc and not self._grpc.is_started:
            await self._grpc.start()
            self._app.before_shutdown(self._grpc.stop)

    async def served(self) -> UserConfig:
        """Tell which versions answer requests now."""
        return user_config(self._repository.declared)


def build(options: dict[str, Any]) -> Application:
    """Make the application from the options of a Serve config file.

    Args:
        options: `limits`, the fields of `minga.inference.limits.Limits`, `grpc`, those of
            `GrpcAddress` or None, and `protection`, those of `minga.inference.access.Protection`.
    """
    ingress = serve.ingress()(InferenceReplica)
    replica = serve.deployment(name=DEPLOYMENT)(ingress)
    protection = Protection(**options.get("protection", {}))
    return replica.bind(Limits(**options["limits"]), options["grpc"], protection)


def _refs(config: UserConfig) -> list[ModelRef]:
    return [ModelRef(**model) for model in config["models"]]
