"""What the tests of training share."""

import shutil
from pathlib import Path

import pytest

from minga.training import TaskReference

TASKS = Path(__file__).parent / "tasks"


@pytest.fixture
def reference():
    """Where the well-behaved Task is."""
    return TaskReference(root=TASKS, name="blobs.py:Blobs")


@pytest.fixture
def blobs(reference):
    """The well-behaved Task."""
    return reference.load()


@pytest.fixture
def splits(blobs):
    """Its data."""
    return blobs.data("1")


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory):
    """An empty MLflow database: making one takes seconds, copying it does not."""
    from minga.training.tracking import connect

    file = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    connect(f"sqlite:///{file}")
    return file


@pytest.fixture
def tracking_uri(migrated_database, tmp_path):
    """A database of this test's own."""
    shutil.copy(migrated_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"
