"""What the tests of training share."""

import shutil
from functools import cache
from pathlib import Path

import pytest

from minga.training import TaskReference
from minga.training.bundle import Bundle
from minga.training.candidate import assess
from minga.training.config import GateConfig
from minga.training.data import profile_of
from minga.training.lineage import Campaign, trace
from minga.training.network import build_network, parameters_of
from minga.training.registry import Registry
from minga.training.schema import infer_schema
from minga.training.signing import Keyring
from minga.training.tracking import Tracker

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


@pytest.fixture
def tracking_uri(migrated_database, tmp_path):
    """A database of this test's own."""
    return f"sqlite:///{shutil.copy(migrated_database, tmp_path)}"


@pytest.fixture(scope="session")
def key_file(tmp_path_factory):
    """Where the key lies that vouches for these tests' versions."""
    return tmp_path_factory.mktemp("keys") / "signing.pem"


@pytest.fixture(scope="session")
def keyring(key_file):
    """That key, which is the only one that is trusted."""
    return Keyring.open(key_file)


@pytest.fixture(scope="session")
def write_bundle(tmp_path_factory, keyring):
    """Writes the bundle of an untrained network, with any verdict."""
    reference = TaskReference(root=TASKS, name="blobs.py:Blobs")
    task = reference.load()
    splits = task.data("1")
    network = build_network(task, task.defaults, splits.train, seed=1)
    schema = infer_schema(splits.train)
    candidate = assess(
        task,
        network,
        splits.test,
        schema=schema,
        profile=profile_of(task, splits.train),
        champion=None,
        config=GateConfig(),
        seed=1,
    )
    lineage = trace(
        task,
        reference,
        params=task.defaults,
        seed=1,
        source="1",
        data_digest="d" * 64,
        num_examples=300,
        parent_version=4,
        campaign=Campaign(name="c1", rounds=5, cohort=8),
    )

    @cache
    def write(*, blessed=True, champion=None, by=keyring, authors=frozenset()):
        folder = tmp_path_factory.mktemp("bundle") / "bundle"
        gates = candidate.report.model_copy(update={"blessed": blessed, "champion": champion})
        Bundle(
            onnx=candidate.onnx,
            parameters=parameters_of(network),
            schema=schema,
            profile=candidate.profile,
            gates=gates,
            lineage=lineage,
            authors=authors,
        ).write(folder, by)
        return folder

    return write


@pytest.fixture(scope="session")
def bundle_folder(write_bundle):
    """The bundle of a version that passed its gates before there was a champion."""
    return write_bundle()


@pytest.fixture
def registry(tracking_uri, keyring):
    """An empty registry."""
    return Registry(tracking_uri, keyring=lambda: keyring)


@pytest.fixture
def register(registry, tracking_uri, tmp_path, write_bundle):
    """Registers a version of `blobs`."""
    tracker = Tracker.open(tracking_uri, str(tmp_path / "artifacts"), "blobs")

    def make(name="blobs", *, blessed=True, **bundle):
        folder = write_bundle(blessed=blessed, **bundle)
        with tracker.run("test") as run_id:
            return registry.register(
                name, folder, run_id=run_id, blessed=blessed, tags={"minga.origin": "x"}
            )

    return make
