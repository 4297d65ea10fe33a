"""Central serving that follows the registry: the champion is served, whoever promotes it."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from minga.cluster.project import Project
from minga.inference.engine import ModelRef
from minga.serving.config import ServingConfig
from minga.serving.registry_source import RegistrySource
from minga.serving.watcher import ModelSource, Watcher, current_versions

if TYPE_CHECKING:
    from minga.serving.host import ServeHost


@contextmanager
def following(
    config: ServingConfig, source: ModelSource, refs: Sequence[ModelRef], *, tracking_uri: str
) -> Iterator["ServeHost"]:
    """Serve models on the Ray of this process, and swap versions whenever the source says so.

    Ray must be shut down afterwards: Ray Serve itself ends with it.

    Args:
        config: how to serve.
        source: asked for the version of each model, again and again.
        refs: the versions to begin with.
        tracking_uri: of MLflow, where it is recorded what is served here and when.

    Yields:
        The host, once it answers.

    Raises:
        PortInUseError: the port is taken.
        ServingError: a version cannot be loaded, or no replica starts.
    """
    # Ray reads its settings when it is imported, so not before it is started.
    from minga.serving.host import start  # noqa: PLC0415
    from minga.serving.service_record import ServiceRecord  # noqa: PLC0415

    host = start(config, refs)
    record = ServiceRecord(tracking_uri, host.url)
    stop = threading.Event()
    watcher = Watcher(source, refs, host.deploy)
    thread = threading.Thread(
        target=watcher.run, args=(stop, config.poll_interval_s, record.note), name="minga-watcher"
    )
    try:
        host.wait_ready()
        thread.start()
        yield host
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()
        record.close()
        host.drain()


@contextmanager
def following_champion(project: Project) -> Iterator[str]:
    """Serve a project's champion at a free port; see `following`."""
    config = project.protected_serving.model_copy(update={"port": 0, "grpc_port": None})
    source = RegistrySource(project.tracking_uri, alias=config.alias)
    refs = current_versions(source, [project.loaded_task.name])
    with following(config, source, refs, tracking_uri=project.tracking_uri) as host:
        yield host.url
