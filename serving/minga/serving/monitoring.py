"""Watches what this process serves, as `[serving.monitor]` says."""

from collections.abc import Iterator
from contextlib import contextmanager

from minga.inference.monitor.keeper import Keeper
from minga.inference.monitor.observer import Observer
from minga.serving.config import MonitorConfig


@contextmanager
def observing(config: MonitorConfig) -> Iterator[Observer | None]:
    """Watch, and judge in this process too; gives None if nothing is to be watched.

    Raises:
        MonitorError: the folder cannot be used.
    """
    if not config.is_on:
        yield None
        return
    with (
        Keeper(config.path, config.windows) as keeper,
        Observer(keeper, flush_s=config.flush_s) as observer,
    ):
        yield observer
