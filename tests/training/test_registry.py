"""Registered versions: files, digests, aliases, on a real MLflow database."""

import numpy as np
import pytest

from minga.training.bundle import MODEL, WEIGHTS, Bundle, Digests, read_parameters
from minga.training.candidate import Champion, assess
from minga.training.config import GateConfig
from minga.training.data import profile_of
from minga.training.errors import GateError, RegistryError
from minga.training.export import run_onnx
from minga.training.lineage import Campaign, trace
from minga.training.network import build_network, parameters_of
from minga.training.registry import CHALLENGER, CHAMPION, Registry
from minga.training.schema import infer_schema
from minga.training.tracking import Tracker


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory):
    """The written bundle of an untrained network."""
    from pathlib import Path

    from minga.training import TaskReference

    reference = TaskReference(root=Path(__file__).parent / "tasks", name="blobs.py:Blobs")
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
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    Bundle(
        onnx=candidate.onnx,
        parameters=parameters_of(network),
        schema=schema,
        profile=candidate.profile,
        gates=candidate.report,
        lineage=lineage,
    ).write(folder)
    return folder


@pytest.fixture
def registry(tracking_uri):
    """An empty registry."""
    return Registry(tracking_uri)


@pytest.fixture
def register(registry, tracking_uri, tmp_path, bundle_folder):
    """Registers a version of `blobs`."""
    tracker = Tracker.open(tracking_uri, str(tmp_path / "artifacts"), "blobs")

    def make(*, blessed=True):
        with tracker.run("test") as run_id:
            return registry.register(
                "blobs", bundle_folder, run_id=run_id, blessed=blessed, tags={"minga.origin": "x"}
            )

    return make


def test_version_carries_what_was_written(registry, register, bundle_folder):
    """Fetching gives the files that were registered, and they are of use."""
    version = register()
    folder = registry.fetch("blobs", version.version)
    assert Digests.of(folder) == Digests.of(bundle_folder) == version.digests
    parameters = read_parameters(folder)
    assert parameters["model.0.weight"].shape == (8, 4)
    inputs = np.zeros((3, 4), np.float32)
    assert run_onnx((folder / MODEL).read_bytes(), inputs).shape == (3,)


def test_mlflow_loads_the_version_too(registry, register, tracking_uri, monkeypatch):
    """MLflow's own loader takes the version, and leaves it intact for ours."""
    import mlflow

    version = register()
    registry.set_alias("blobs", CHAMPION, version.version)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_registry_uri(tracking_uri)
    model = mlflow.pyfunc.load_model("models:/blobs@champion")
    assert model.predict(np.zeros((2, 4), np.float32))["output"].shape == (2,)
    registry.fetch("blobs", "champion")


def test_card_tells_where_the_version_comes_from(bundle_folder):
    """The model card has verdict, metrics, columns and the campaign."""
    card = (bundle_folder / "README.md").read_text()
    for words in ("passed all gates", "| accuracy |", "| x3 | number |", "campaign c1: 5 rounds"):
        assert words in card


@pytest.mark.parametrize("name", [MODEL, WEIGHTS, "gates.json"])
def test_changed_files_are_refused(registry, register, name):
    """A file that differs by one byte from what was registered is not given out."""
    version = register()
    file = registry.fetch("blobs", version.version) / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(RegistryError, match="was changed after it was registered"):
        registry.fetch("blobs", version.version)
    with pytest.raises(RegistryError, match="was changed"):
        registry.promote("blobs", version.version)


def test_lost_files_are_noticed(registry, register):
    """A version whose file is gone is refused with the file's name."""
    version = register()
    (registry.fetch("blobs", version.version) / WEIGHTS).unlink()
    with pytest.raises(RegistryError, match=f"lacks {WEIGHTS}"):
        registry.fetch("blobs", version.version)


def test_promotion_moves_the_alias(registry, register):
    """The champion is one version; promoting the challenger leaves no challenger."""
    first, second = register(), register()
    registry.promote("blobs", first.version)
    registry.set_alias("blobs", CHALLENGER, second.version)
    promoted = registry.promote("blobs", "challenger")
    assert promoted.aliases == ("champion",)
    assert registry.get("blobs", CHAMPION).version == second.version
    assert registry.find("blobs", CHALLENGER) is None
    assert [version.version for version in registry.list_versions("blobs")] == [2, 1]


def test_unblessed_version_is_not_promoted(registry, register):
    """What its gates refused becomes champion only by override, which is recorded."""
    version = register(blessed=False)
    with pytest.raises(GateError, match="did not pass its gates"):
        registry.promote("blobs", version.version)
    assert registry.find("blobs", CHAMPION) is None
    promoted = registry.promote("blobs", version.version, override=True)
    assert promoted.tags["minga.overridden"] == "true"
    assert not promoted.blessed


def test_what_is_not_registered_is_explained(registry, register):
    """Unknown models, versions and aliases are messages with what there is."""
    with pytest.raises(RegistryError, match="no model 'blobs' is registered; models: none yet"):
        registry.get("blobs", 1)
    assert registry.find("blobs", 1) is None
    register()
    with pytest.raises(RegistryError, match="has no version 9"):
        registry.get("blobs", 9)
    with pytest.raises(RegistryError, match="called 'champion'; aliases: none yet"):
        registry.get("blobs", "champion")


def test_champion_that_takes_other_data_is_a_schema_break(blobs, splits, bundle_folder):
    """A candidate for other columns than the champion's is refused, not compared."""
    network = build_network(blobs, blobs.defaults, splits.train, seed=1)
    schema = infer_schema(splits.train, ("a", "b", "c", "d"))
    champion = Champion(
        version=1,
        onnx=(bundle_folder / MODEL).read_bytes(),
        schema=infer_schema(splits.train, ("a", "b", "c", "e")),
    )
    report = assess(
        blobs,
        network,
        splits.test,
        schema=schema,
        profile=profile_of(blobs, splits.train),
        champion=champion,
        config=GateConfig(),
        seed=1,
    ).report
    assert [gate.name for gate in report.refused] == ["accuracy against champion", "schema"]


def test_runs_are_recorded_with_their_history(tracking_uri, tmp_path):
    """Params, metrics by epoch, tags and the end of a run are in MLflow; children are nested."""
    tracker = Tracker.open(tracking_uri, str(tmp_path / "artifacts"), "blobs")
    with tracker.run("parent") as parent, tracker.run("child", parent=parent) as child:
        tracker.log(
            child,
            params={"lr": 0.1},
            history=[{"epoch": n, "loss": 1 / n} for n in range(1, 1201)],
            tags={"minga.status": "cut"},
        )
    run = tracker.client.get_run(child)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1"}
    assert run.data.tags["mlflow.parentRunId"] == parent
    history = tracker.client.get_metric_history(child, "loss")
    assert [metric.step for metric in history][-1] == 1200


def test_run_that_fails_is_recorded_as_failed(tracking_uri, tmp_path):
    """An error or a Ctrl-C inside of a run ends it as what it was."""
    tracker = Tracker.open(tracking_uri, str(tmp_path / "artifacts"), "blobs")
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), tracker.run("test") as run_id:
            raise error
        assert tracker.client.get_run(run_id).info.status == status
