"""What several parts' tests share."""

import os
from collections.abc import Iterator

import pytest

from minga.cluster.stack import local_ray


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the chaos test be made longer, or repeated."""
    group = parser.getgroup("chaos", "tests/federation/test_chaos.py")
    group.addoption("--chaos-points", type=int, default=40, help="how often it kills")
    group.addoption("--chaos-seed", type=int, help="which points; drawn at random by default")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small Ray for the whole session: starting it takes longer than most tests."""
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
    with local_ray(num_cpus=4):
        yield
