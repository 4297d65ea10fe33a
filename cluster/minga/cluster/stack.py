"""The Ray that search, training and serving share: this machine's, or a cluster's."""

import logging
import os
import secrets
from collections.abc import Iterator
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
    }


@contextmanager
def local_ray(*, num_cpus: int | None = None) -> Iterator[None]:
    """Run Ray on this machine for as long as the block lasts, or join the cluster that is set.

    A Ray that runs in this process already is used and left running. Settings that the
    environment has already are kept.

    Args:
        num_cpus: how many Ray may give away; by default this machine's, and at least `MIN_CPUS`.

    Raises:
        StackError: nobody answers at MINGA_RAY_ADDRESS.
    """
    address = Settings().ray_address
    for name, value in ray_environment().items():
        if not (address and name.startswith("RAY_AUTH_")):  # a cluster has a token of its own
            os.environ.setdefault(name, value)
    import ray  # noqa: PLC0415 - it reads those settings when it is imported

    if ray.is_initialized():
        yield
        return
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
    try:
        yield
    finally:
        ray.shutdown()
