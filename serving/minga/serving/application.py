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
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any, Final, TypedDict
from uuid import uuid4

from ray import serve
from ray.serve import Application

from minga.inference.access import Protection
from minga.inference.app import InferenceApp
from minga.inference.comparing import Comparison
from minga.inference.engine import ModelRef
from minga.inference.errors import InferenceError, ModelError, UnavailableError, UnknownModelError
from minga.inference.grpc_server import GrpcServer
from minga.inference.limits import Limits
from minga.inference.repository import ModelRepository
from minga.serving.counting import ReplicaCounts
from minga.serving.errors import HostError
from minga.serving.replicas import DEPLOYMENT, ask_all

IMPORT_PATH: Final = "minga.serving.application:build"
_CONTROL_TIMEOUT_S: Final = 60.0

_LOG: Final = logging.getLogger("ray.serve")  # the only one whose lines reach the replica's log


class UserConfig(TypedDict):
    """What Ray Serve hands to `reconfigure`: plain values, as a Serve config file holds them."""

    models: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]


def user_config(refs: Sequence[ModelRef], comparisons: Sequence[Comparison] = ()) -> UserConfig:
    """Write versions as a user config; of a model's versions the first is its default."""
    return {
        "models": [asdict(ref) | {"baseline": list(ref.baseline)} for ref in refs],
        "comparisons": [asdict(each) | {"mode": each.mode.value} for each in comparisons],
    }


class GrpcAddress(TypedDict):
    """Where replicas listen for gRPC."""

    host: str
    port: int


class ReplicasControl:
    """Loads and unloads in all replicas, whichever was asked; see `InferenceReplica.control`."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    async def load(self, name: str) -> None:
        """See `ModelControl.load`; where one replica cannot, none of them does."""
        try:
            await self._all(name, "load")
        except ModelError:
            await self._all(name, "unload")
            raise

    async def unload(self, name: str) -> None:
        """See `ModelControl.unload`."""
        await self._all(name, "unload")

    async def _all(self, name: str, verb: str) -> None:
        self._repository.require(name)
        ask = partial(ask_all, "control", name, verb, timeout_s=_CONTROL_TIMEOUT_S)
        try:
            refusals = [reason for reason in await asyncio.to_thread(ask) if reason]
        except HostError as error:
            raise UnavailableError(f"cannot {verb} {name!r}: {error}") from error
        if refusals:
            raise ModelError(refusals[0])


class InferenceReplica:
    """One process that answers for all models.

    gRPC comes straight to the replica, on a port that all replicas of a machine share: Ray
    Serve's own proxy for it listens on every interface and passes each message through pickle.

    Args:
        limits: what callers are granted.
        models: the arguments of `ModelRepository`.
        grpc: where to listen for gRPC; None means nowhere.
        protection: who is let in, and gRPC's TLS; that of HTTP is Ray Serve's proxy's.
    """

    def __init__(
        self,
        limits: Limits,
        models: Mapping[str, Any] | None = None,
        grpc: GrpcAddress | None = None,
        protection: Protection | None = None,
    ) -> None:
        protection = protection or Protection()
        self._id = uuid4().hex
        self._repository = ModelRepository(**models or {})
        control = ReplicasControl(self._repository)
        self._app = InferenceApp(
            self._repository, limits=limits, control=control, access=protection.access()
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
        except InferenceError as error:
            return str(error)
        return None

    async def control(self, name: str, verb: str) -> str | None:
        """Load or unload a model in this replica alone; give the reason if it is refused."""
        change = self._repository.load if verb == "load" else self._repository.unload
        try:
            await asyncio.to_thread(change, name)
        except UnknownModelError:
            pass  # the declaration has changed since the caller looked
        except InferenceError as error:
            return str(error)
        return None

    async def unloaded(self) -> list[str]:
        """Tell which models callers have unloaded."""
        return sorted(self._repository.unloaded)

    async def reconfigure(self, config: UserConfig) -> None:
        """Serve what is declared.

        A replica that serves already never fails here, because Ray Serve would stop it, and
        with it the versions that are good. A new replica does, so that it is not used.
        """
        is_new = not self._repository.is_ready
        side_by_side = self._app.service.side_by_side
        comparisons = [Comparison(**each) for each in config["comparisons"]]
        # One that ends does so before its challenger goes; one that begins, after it came.
        side_by_side.declare([each for each in side_by_side.declared if each in comparisons])
        try:
            await asyncio.to_thread(self._repository.apply, _refs(config))
            side_by_side.declare(comparisons)
        except InferenceError:
            if not self._repository.is_ready:
                raise
            _LOG.exception("the declared versions are refused; the old ones go on being served")
        if is_new and self._app.service.limits.model_control:
            await self._do_as_the_others()
        if self._grpc and not self._grpc.is_started:
            await self._grpc.start()
            self._app.before_shutdown(self._grpc.stop)

    async def _do_as_the_others(self) -> None:
        """Unload what callers have unloaded in the replicas that run already, if any do."""
        ask = partial(ask_all, "unloaded", timeout_s=_CONTROL_TIMEOUT_S)
        try:
            answers = await asyncio.to_thread(ask)
        except HostError:
            return  # the first replica of all
        for name in {name for names in answers for name in names}:
            await self.control(name, "unload")

    async def served(self) -> UserConfig:
        """Tell which versions answer requests now."""
        return user_config(self._repository.declared, self._app.service.side_by_side.declared)

    async def counts(self) -> ReplicaCounts:
        """Tell what was counted of the comparisons."""
        counts = deepcopy(self._app.service.side_by_side.counts())  # sent on another thread
        return ReplicaCounts(replica=self._id, counts=counts)


def build(options: dict[str, Any]) -> Application:
    """Make the application from the options of a Serve config file.

    Args:
        options: `limits`, the fields of `minga.inference.limits.Limits`; `models`, the arguments
            of `ModelRepository`; `grpc`, the fields of `GrpcAddress`, or None; and `protection`,
            those of `minga.inference.access.Protection`.
    """
    ingress = serve.ingress()(InferenceReplica)
    replica = serve.deployment(name=DEPLOYMENT)(ingress)
    protection = Protection(**options.get("protection", {}))
    limits = Limits(**options["limits"])
    return replica.bind(limits, options["models"], options["grpc"], protection)


def _refs(config: UserConfig) -> list[ModelRef]:
    return [ModelRef(**model) for model in config["models"]]
