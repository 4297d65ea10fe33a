"""What runs in each replica of the Ray Serve application.

A replica answers HTTP and gRPC itself, with the servers of `minga.inference` and nothing in front
of them (`front`); Ray Serve starts replicas, sees that they live, and ends them. All models are in
the one application, so a URL names a model and not a deployment, and a version is exchanged
inside the replica by `user_config`, which restarts nothing.

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

import ray
from prometheus_client import CollectorRegistry
from ray import serve
from ray.serve import Application

from minga.inference.access import Protection
from minga.inference.app import InferenceApp
from minga.inference.comparing import Comparison
from minga.inference.engine import ModelRef
from minga.inference.errors import InferenceError, ModelError, UnavailableError, UnknownModelError
from minga.inference.limits import Limits
from minga.inference.monitor.observer import Observer
from minga.inference.open_files import allow_open_files
from minga.inference.repository import ModelRepository
from minga.inference.settling import settle
from minga.inference.tally import Tally
from minga.serving.config import MonitorConfig
from minga.serving.counting import ReplicaCounts
from minga.serving.errors import HostError
from minga.serving.front import Address, Front
from minga.serving.metrics_actor import SharedMetrics
from minga.serving.monitor_actor import ActorSink
from minga.serving.replicas import DEPLOYMENT, ask_all
from minga.serving.scaling import REQUESTS_IN_HAND

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

    Args:
        limits: what callers are granted.
        models: the arguments of `ModelRepository`.
        http: where to listen for HTTP, beside the other replicas of the machine.
        grpc: where to listen for gRPC; None means nowhere.
        protection: who is let in, and TLS.
        monitor: how what is answered is watched; None means not at all.
        shares_metrics: whether `/metrics` tells of all replicas, which takes a Ray, or of this one.
    """

    def __init__(
        self,
        limits: Limits,
        http: Address,
        *,
        models: Mapping[str, Any] | None = None,
        grpc: Address | None = None,
        protection: Protection | None = None,
        monitor: MonitorConfig | None = None,
        shares_metrics: bool = False,
    ) -> None:
        allow_open_files()
        protection = protection or Protection()
        self._id = uuid4().hex
        registry = CollectorRegistry()
        self._metrics = SharedMetrics(self._id, registry) if shares_metrics else None
        self._repository = ModelRepository(**models or {})
        self._observer = _observer(monitor)
        app = InferenceApp(
            self._repository,
            limits=limits,
            registry=registry,
            exposition=self._metrics.exposition if self._metrics else None,
            control=ReplicasControl(self._repository),
            access=protection.access(),
            observer=self._observer,
        )
        self._service = app.service
        self._front = Front(app, http, grpc, protection.tls())

    @property
    def url(self) -> str:
        """Where clients on this machine reach the models, once something is declared."""
        return self._front.url

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
        side_by_side = self._service.side_by_side
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
        if is_new and self._service.limits.model_control:
            await self._do_as_the_others()
        if not self._front.is_started:
            settle()
            await self._front.start()
            if self._metrics is not None:
                self._metrics.start()

    async def check_health(self) -> None:
        """Wait for the loop that answers requests; Ray Serve replaces a replica that hangs."""
        if self._front.is_started:
            await self._front.run(asyncio.sleep(0))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Ray Serve's autoscaler how many requests were in hand lately."""
        return {REQUESTS_IN_HAND: self._front.mean_requests() if self._front.is_started else 0.0}

    async def end(self) -> None:
        """Answer what has been asked, and hand over what was counted last."""
        if self._front.is_started:
            await self._front.stop()
        if self._observer is not None:
            await asyncio.to_thread(self._observer.close)
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.close)

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
        return user_config(self._repository.declared, self._service.side_by_side.declared)

    async def counts(self) -> ReplicaCounts:
        """Tell what was counted of the comparisons."""
        counts = await self._front.run(self._copy_counts()) if self._front.is_started else {}
        return ReplicaCounts(replica=self._id, counts=counts)

    async def node(self) -> str:
        """Name the address of this machine in the Ray cluster."""
        address: str = ray.util.get_node_ip_address()
        return address

    async def _copy_counts(self) -> dict[str, dict[str, Tally]]:
        return deepcopy(self._service.side_by_side.counts())


class HostedReplica(InferenceReplica):
    """A replica that Ray Serve ends in its way: it calls the destructor, and waits for it."""

    async def __del__(self) -> None:
        await self.end()


def build(options: dict[str, Any]) -> Application:
    """Make the application from the options of a Serve config file.

    Args:
        options: `limits`, the fields of `minga.inference.limits.Limits`; `http`, the fields of
            `minga.serving.front.Address`; `models`, the arguments of `ModelRepository`; `grpc`,
            as `http`, or None; and `protection`, the fields of
            `minga.inference.access.Protection`. `monitor`, those of `MonitorConfig`, may be left
            out.
    """
    given = options.get("monitor")
    return serve.deployment(name=DEPLOYMENT)(HostedReplica).bind(
        Limits(**options["limits"]),
        options["http"],
        models=options["models"],
        grpc=options["grpc"],
        protection=Protection(**options.get("protection", {})),
        monitor=MonitorConfig.model_validate(given) if given else None,
        shares_metrics=True,
    )


def _observer(config: MonitorConfig | None) -> Observer | None:
    if config is None or not config.is_on:
        return None
    observer = Observer(ActorSink(config), flush_s=config.flush_s)
    observer.start()
    return observer


def _refs(config: UserConfig) -> list[ModelRef]:
    return [ModelRef(**model) for model in config["models"]]
