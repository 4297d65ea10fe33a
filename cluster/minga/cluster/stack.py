"""The Ray that search, training and serving share: this machine's, or a cluster's."""

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from minga.cluster.errors import StackError
from minga.cluster.settings import Settings
from minga.training.interrupts import handlers_restored

MIN_CPUS = 4
"""Ray only counts CPUs; with fewer, two trainers and a server would wait for each other."""


def ray_environment() -> dict[str, str]:
    """Give the settings that Ray reads when it is imported and its processes inherit."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray listens on all interfaces: whoever cannot show this session's token is refused.
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Else workers run at nice +15 and starve beside anything else.
        "RAY_worker_niceness": "0",
        # Reports wait for the next health check; 2 s by default.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
        # As many workers as processors, which compete with those that the work asks for.
        "RAY_prestart_worker_first_driver": "0",
        # A process of its own that looks for machines about to be reclaimed.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    }


ONE_MACHINE = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER")
"""Which of those settings are for a Ray of this machine alone: a cluster has a token of its own."""


@contextmanager
def local_ray(
    *, num_cpus: int | None = None, meanwhile: Callable[[], object] | None = None
) -> Iterator[None]:
    """Run Ray on this machine for as long as the block lasts, or join the cluster that is set.

    A Ray that runs in this process already is used and left running. Settings that the
    environment has already are kept.

    Args:
        num_cpus: how many Ray may give away; by default this machine's, and at least `MIN_CPUS`.
        meanwhile: is called in a thread while Ray starts, and is done when the block begins; it
            leaves Ray alone.

    Raises:
        StackError: nobody answers at MINGA_RAY_ADDRESS.
        Exception: what `meanwhile` raised.
    """
    address = Settings().ray_address
    for name, value in ray_environment().items():
        if not (address and name in ONE_MACHINE):
            os.environ.setdefault(name, value)
    import ray  # noqa: PLC0415 - it reads those settings when it is imported

    if ray.is_initialized():
        if meanwhile is not None:
            meanwhile()
        yield
        return
    try:
        with _beside(meanwhile):
            _start(address, num_cpus)
        yield
    finally:
        ray.shutdown()


def _start(address: str, num_cpus: int | None) -> None:
    """Start Ray here, or join the cluster at the address."""
    import ray  # noqa: PLC0415 - see `local_ray`

    for name in ("ray", "ray.tune", "ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    with handlers_restored():
        if address:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, ValueError) as error:
                raise StackError(
                    f"no Ray answers at MINGA_RAY_ADDRESS = {address}: {error}; start it, or unset "
                    "the variable for a Ray of this machine"
                ) from error
        else:
            ray.init(
                address="local",
                num_cpus=num_cpus or max(os.cpu_count() or 1, MIN_CPUS),
                include_dashboard=False,
                **quiet,
            )


@contextmanager
def _beside(work: Callable[[], object] | None) -> Iterator[None]:
    """Do some work in a thread while the block lasts, and wait for it; its error is raised."""
    if work is None:
        yield
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="minga-meanwhile") as pool:
        done = pool.submit(work)
        yield
        done.result()
