"""Serving from this process alone, without Ray: one machine, 60 MB instead of 1 GB."""

import asyncio
import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from minga.inference.app import InferenceApp
from minga.inference.engine import ModelRef
from minga.inference.grpc_server import GrpcServer
from minga.inference.repository import ModelRepository
from minga.inference.server import Server
from minga.serving.config import ServingConfig
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
) -> None:
    """Serve versions and follow their source until cancelled.

    `num_replicas` and what else concerns Ray is not heeded.

    Args:
        config: how to serve.
        source: where new versions come from.
        refs: what to serve first.
        on_ready: hears the URL, and gRPC's if there is one, once requests are answered.
        tracking_uri: of MLflow, where it is recorded what is served here; nowhere if empty.

    Raises:
        AccessError: it would not be protected as it has to be.
        PortInUseError: the port is taken.
        ModelError: one of the versions cannot be loaded.
    """
    protection = config.protection
    protection.check(config.host)
    access, tls = protection.access(), protection.tls()
    repository = ModelRepository()
    repository.apply(refs)
    app = InferenceApp(repository, limits=config.limits, access=access)
    stop = threading.Event()
    watcher = Watcher(source, refs, repository.apply)
    async with AsyncExitStack() as stack:
        front = Server(app, host=config.host, port=config.port, tls=tls)
        http = await stack.enter_async_context(front)
        grpc_url = None
        if config.grpc_port is not None:
            server = GrpcServer(app.service, host=config.host, port=config.grpc_port, tls=tls)
            grpc_url = (await stack.enter_async_context(server)).url
        gc.freeze()  # what is loaded stays; looking through it again costs requests their time
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


def _record(tracking_uri: str, url: str) -> "ServiceRecord":
    from minga.serving.service_record import ServiceRecord  # noqa: PLC0415 - loads MLflow

    return ServiceRecord(tracking_uri, url)
