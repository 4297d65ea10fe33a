"""Serving from this process alone, without Ray, for one machine.

The engine takes about 100 MB with a small model (`tests/serving/test_hostile.py`); what follows
the registry, MLflow's client, takes more than that again. A Ray host takes about 1 GB.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from copy import deepcopy
from typing import TYPE_CHECKING

from minga.inference.app import InferenceApp
from minga.inference.comparing import Comparison
from minga.inference.engine import ModelRef
from minga.inference.grpc_server import GrpcServer
from minga.inference.repository import ModelRepository
from minga.inference.server import Server
from minga.inference.service import InferenceService
from minga.inference.settling import settle
from minga.serving.config import ServingConfig
from minga.serving.counting import ReplicaCounts
from minga.serving.monitoring import observing
from minga.serving.referee import Referee
from minga.serving.watcher import ModelSource, Watcher

if TYPE_CHECKING:
    from minga.serving.service_record import ServiceRecord


async def serve_locally(
    config: ServingConfig,
    source: ModelSource,
    refs: Sequence[ModelRef],
    on_ready: Callable[[str, str | None], None],
    *,
    tracking_uri: str = "",
    referee: Referee | None = None,
) -> None:
    """Serve versions and follow their source until cancelled.

    `num_replicas` and what else concerns Ray is not heeded.

    Args:
        config: how to serve.
        source: where new versions come from.
        refs: what to serve first.
        on_ready: hears the URL, and gRPC's if there is one, once requests are answered.
        tracking_uri: of MLflow, where it is recorded what is served here; nowhere if empty.
        referee: says which versions are compared; None if none are.

    Raises:
        AccessError: it would not be protected as it has to be.
        PortInUseError: the port is taken.
        ModelError: one of the versions cannot be loaded.
        MonitorError: the monitor's folder cannot be used.
    """
    protection = config.protection
    protection.check(config.host)
    access, tls = protection.access(), protection.tls()
    if referee is not None:
        refs = [referee.begin(ref) for ref in refs]
    repository = ModelRepository(**config.models)
    repository.apply(refs)
    stop = threading.Event()
    async with AsyncExitStack() as stack:
        observer = stack.enter_context(observing(config.monitor))
        app = InferenceApp(repository, limits=config.limits, access=access, observer=observer)
        host = LocalHost(app.service, asyncio.get_running_loop())
        watcher = Watcher(source, refs, host, referee)
        front = Server(app, host=config.host, port=config.port, tls=tls)
        http = await stack.enter_async_context(front)
        grpc_url = None
        if config.grpc_port is not None:
            server = GrpcServer(app.service, host=config.host, port=config.grpc_port, tls=tls)
            grpc_url = (await stack.enter_async_context(server)).url
        settle()
        on_ready(http.url, grpc_url)
        record = _record(tracking_uri, http.url) if tracking_uri else None
        note = record.note if record else None
        watching = asyncio.create_task(
            asyncio.to_thread(watcher.run, stop, config.poll_interval_s, note)
        )
        try:
            await asyncio.shield(watching)
        finally:
            stop.set()
            await watching
            if record:
                await asyncio.to_thread(record.close)


class LocalHost:
    """A `watcher.Host` that is this process.

    Args:
        service: what serves.
        loop: where it does; the methods are called from another thread.
    """

    def __init__(self, service: InferenceService, loop: asyncio.AbstractEventLoop) -> None:
        self._service = service
        self._loop = loop

    def deploy(self, refs: Sequence[ModelRef], comparisons: Sequence[Comparison] = ()) -> None:
        """See `Host.deploy`."""
        side_by_side = self._service.side_by_side
        side_by_side.declare([each for each in side_by_side.declared if each in comparisons])
        self._service.repository.apply(refs)
        side_by_side.declare(comparisons)

    def counts(self) -> list[ReplicaCounts]:
        """See `Host.counts`."""
        return [asyncio.run_coroutine_threadsafe(self._copy_counts(), self._loop).result()]

    async def _copy_counts(self) -> ReplicaCounts:
        counts = deepcopy(self._service.side_by_side.counts())
        return ReplicaCounts(replica="this process", counts=counts)


def _record(tracking_uri: str, url: str) -> "ServiceRecord":
    from minga.serving.service_record import ServiceRecord  # noqa: PLC0415 - loads MLflow

    return ServiceRecord(tracking_uri, url)
