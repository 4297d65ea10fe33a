"""What several parts' tests share."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from minga.cluster.stack import local_ray, ray_environment

ROOT = Path(__file__).parent

# How long an example takes says more of the machine than of the code.
settings.register_profile("minga", deadline=None)
settings.load_profile("minga")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let tests that leave something to chance be made longer, or repeated."""
    group = parser.getgroup("chaos", "tests/federation/test_chaos.py, test_fuzz.py")
    group.addoption("--chaos-points", type=int, default=40, help="how often test_chaos.py kills")
    group.addoption("--chaos-seed", type=int, help="what happens; drawn at random by default")


def pytest_configure() -> None:
    """Set what Ray reads when it is imported, whichever test imports it first."""
    for name, value in ray_environment().items():
        os.environ.setdefault(name, value)


LONGEST = (
    "test_readme.py",
    "cluster/test_demo.py",
    "cluster/test_reproduction.py",
    "training/test_train.py",
    "training/test_search.py",
    "cluster/test_own_csv.py",
    "test_examples.py",
    "test_benchmarks.py",
    "cluster/test_pipeline.py",
    "federation/test_chaos.py",
    "serving/test_host.py",
    "cluster/test_response_work.py",
    "training/test_larger.py",
    "cluster/test_submission.py",
    "federation/test_fuzz.py",
)
"""Files that take more than half a minute."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the longest where files run side by side, so that none is left over at the end."""
    if hasattr(config, "workerinput"):
        begin = {ROOT / name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: begin.get(item.path, len(begin)))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One small Ray for the whole session: starting it takes longer than most tests."""
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
    for what in ("REPLICA", "HANDLE"):
        os.environ.setdefault(f"RAY_SERVE_{what}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    with local_ray(num_cpus=4):
        yield


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: making one takes seconds, copying it does not."""
    from minga.training.tracking import connect

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{file}")
    return file


@pytest.fixture(scope="session")
def registry_uri(migrated_database: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An empty registry that tests share."""
    folder = tmp_path_factory.mktemp("registry")
    return f"sqlite:///{shutil.copy(migrated_database, folder)}"


@pytest.fixture(scope="session")
def with_database(migrated_database: Path) -> Callable[[Path], Path]:
    """Puts an empty database where a project makes one, and gives the project's folder."""

    def put(folder: Path) -> Path:
        (folder / ".minga").mkdir()
        shutil.copy(migrated_database, folder / ".minga")
        return folder

    return put
