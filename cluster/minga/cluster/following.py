"""Central serving that follows the registry: the champion is served, whoever promotes it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from minga.cluster.project import Project
from minga.serving.registry_source import RegistrySource
from minga.serving.watcher import Watcher, current_versions


@contextmanager
def following(project: Project, *, port: int | None = None) -> Iterator[str]:
    """Serve a project's champion on the Ray of this process, and swap whenever it changes.

    Args:
        project: whose `[serving]` table and registry are meant.
        port: instead of the table's; 0 takes a free one.

    Yields:
        The server's URL, once it answers.
    """
    # Ray reads its settings when it is imported, so not before it is started.
    from minga.serving.host import start  # noqa: PLC0415

    config = project.serving
    if port is not None:
        config = config.model_copy(update={"port": port})
    source = RegistrySource(project.tracking_uri, alias=config.alias)
    refs = current_versions(source, [project.loaded_task.name])
    host = start(config, refs)
    stop = threading.Event()
    try:
        watcher = Watcher(source, refs, host.deploy)
        host.wait_ready()
        thread = threading.Thread(
            target=watcher.run, args=(stop, config.poll_interval_s), name="minga-watcher"
        )
        thread.start()
        try:
            yield host.url
        finally:
            stop.set()
            thread.join()
    finally:
        host.stop()
