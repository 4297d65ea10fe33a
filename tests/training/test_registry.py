"""Registered versions: files, digests, aliases, on a real MLflow database."""

import base64
import contextlib
import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from minga.training.bundle import GATES, MODEL, VERDICT, WEIGHTS, Digests, read_parameters
from minga.training.candidate import Champion, assess
from minga.training.card import Card
from minga.training.config import GateConfig
from minga.training.data import profile_of
from minga.training.errors import ConflictError, GateError, RegistryError, VerdictError
from minga.training.export import run_onnx
from minga.training.lineage import Lineage
from minga.training.network import build_network
from minga.training.registry import CHALLENGER, CHAMPION, Registry
from minga.training.schema import infer_schema
from minga.training.signing import Keyring
from minga.training.tracking import Tracker


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


def test_versions_are_not_overwritten(registry, register, write_bundle):
    """A second version of a run would take the first one's place, so it is refused."""
    version = register()
    with pytest.raises(RegistryError, match="has version 1 of blobs already"):
        registry.register(
            "blobs", write_bundle(champion=1), run_id=version.run_id, blessed=True, tags={}
        )
    assert Digests.of(registry.fetch("blobs", version.version)) == version.digests


def test_model_is_staged_where_its_version_will_be(registry, tracking_uri, tmp_path, bundle_folder):
    """What is tried before there is a version is the file that the version has afterwards.

    Nothing is staged in the place of a version.
    """
    run_id = Tracker.open(tracking_uri, str(tmp_path / "artifacts"), "blobs").start("train")
    onnx = (bundle_folder / MODEL).read_bytes()
    file = registry.stage(run_id, onnx)
    version = registry.register("blobs", bundle_folder, run_id=run_id, blessed=True, tags={})
    assert registry.fetch("blobs", version.version) / MODEL == file
    with pytest.raises(RegistryError, match="has version 1 of blobs already"):
        registry.stage(run_id, b"another")
    assert file.read_bytes() == onnx


def test_lost_files_are_noticed(registry, register):
    """A version whose file is gone is refused with the file's name."""
    version = register()
    (registry.fetch("blobs", version.version) / WEIGHTS).unlink()
    with pytest.raises(RegistryError, match=f"lacks {WEIGHTS}"):
        registry.fetch("blobs", version.version)


def test_promotion_moves_the_alias(registry, register):
    """The champion is one version; promoting the challenger leaves no challenger."""
    first, second = register(), register(champion=1)
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
    promoted = registry.promote("blobs", version.version, override="ticket 7")
    assert promoted.tags["minga.overridden"] == "true"
    assert not promoted.blessed
    (entry,) = registry.decisions("blobs")
    assert (entry.version, entry.reason, entry.champion_before) == (1, "ticket 7", None)


def retag(registry, version):
    """Make the registry's tags agree with the files, as who can write to it may."""
    digests = Digests.of(registry._folder(version))
    for tag, value in (
        ("minga.blessed", "true"),
        ("minga.onnx_sha256", digests.onnx),
        ("minga.weights_sha256", digests.weights),
        ("minga.bundle_sha256", digests.bundle),
    ):
        registry._tag(version, tag, value)


def bless(folder):
    """Forge the gate report."""
    report = json.loads((folder / GATES).read_text())
    (folder / GATES).write_text(json.dumps(report | {"blessed": True}))


def bless_both(folder):
    """Forge the gate report and the statement, whose signature is then of something else."""
    bless(folder)
    envelope = json.loads((folder / VERDICT).read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    statement["predicate"]["blessed"] = True
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()
    (folder / VERDICT).write_text(json.dumps(envelope))


def exchange(folder):
    """Put in other weights."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def remove_signature(folder):
    """Leave the statement without a signature."""
    envelope = json.loads((folder / VERDICT).read_text())
    (folder / VERDICT).write_text(json.dumps(envelope | {"signatures": []}))


def replace_by_garbage(folder):
    """Leave no statement at all."""
    (folder / VERDICT).write_bytes(b"\x80\x04")


@pytest.mark.parametrize(
    ("forge", "complaint"),
    [
        (bless, "on other files than these"),
        (bless_both, "was altered after it was signed"),
        (exchange, "on other files than these"),
        (remove_signature, "signed by nobody"),
        (replace_by_garbage, "cannot be read"),
    ],
)
def test_tampered_verdict_is_refused(registry, register, forge, complaint):
    """Who can write files and tags, but has no trusted key, cannot bring a version to production.

    A reason to override the gates does not override that.
    """
    version = register(blessed=False)
    forge(registry.fetch("blobs", version.version))
    retag(registry, version)
    for reason in ("", "I insist"):
        with pytest.raises(VerdictError, match=complaint):
            registry.promote("blobs", version.version, override=reason)
    assert registry.find("blobs", CHAMPION) is None


def test_verdict_of_a_stranger_counts_once_the_key_is_trusted(
    registry, register, tracking_uri, tmp_path, keyring
):
    """A colleague's verdict is believed as soon as the colleague's public key is named."""
    colleague = Keyring.open(tmp_path / "colleague.pem")
    version = register(by=colleague)
    with pytest.raises(VerdictError, match="no trusted key"):
        registry.promote("blobs", version.version)
    trusting = Keyring(keyring.own, (*keyring.trusted, colleague.public_key))
    Registry(tracking_uri, keyring=lambda: trusting).promote("blobs", version.version)
    assert registry.get("blobs", CHAMPION).version == version.version


def test_verdict_on_another_model_does_not_count(registry, register):
    """A bundle that was judged as one model is not promoted as another."""
    register("other")
    with pytest.raises(VerdictError, match="on the model 'blobs', not on 'other'"):
        registry.promote("other", 1)


def test_overtaken_version_is_refused(registry, register):
    """What was judged against a champion takes the place of no other; what was champion may return.

    Of two versions judged against the same champion only one can be promoted by its verdict.
    """
    first, second, third = (register(champion=judged) for judged in (None, 1, 1))
    registry.promote("blobs", first.version)
    registry.promote("blobs", second.version)
    with pytest.raises(ConflictError, match="judged against version 1, but version 2 is champion"):
        registry.promote("blobs", third.version)
    assert registry.promote("blobs", first.version).aliases == ("champion",)
    assert registry.promote("blobs", third.version).aliases == ("champion",)
    registry.promote("blobs", second.version, override="back to the one before")
    history = registry.decisions("blobs")
    assert [(p.number, p.version, p.champion_before) for p in history] == [
        (1, 1, None),
        (2, 2, 1),
        (3, 1, 2),
        (4, 3, 1),
        (5, 2, 3),
    ]


def test_retired_version_is_promoted_for_a_reason_alone(registry, register):
    """Retirement takes a version out of use, by a signed entry; the champion stays."""
    first, second = register(), register()
    registry.promote("blobs", first.version)
    with pytest.raises(GateError, match="promote another one first"):
        registry.retire("blobs", first.version, reason="old")
    registry.set_alias("blobs", CHALLENGER, second.version)
    assert registry.retire("blobs", second.version, reason="broken sensor").aliases == ()
    with pytest.raises(GateError, match=r"was retired by .*: broken sensor"):
        registry.promote("blobs", second.version)
    assert registry.promote("blobs", second.version, override="it was not").aliases
    kinds = [(one.kind, one.version, one.reason) for one in registry.decisions("blobs")]
    assert kinds == [
        ("promoted", 1, ""),
        ("retired", 2, "broken sensor"),
        ("promoted", 2, "it was not"),
    ]


def test_a_former_champion_returns_with_its_own_files_alone(registry, register, write_bundle):
    """Who writes to the registry cannot bring other files back under a former champion's number.

    They have a verdict of their own, so signatures alone would let them in.
    """
    first, second = register(), register(champion=1)
    for version in (first, second):
        registry.promote("blobs", version.version)
    overtaken = write_bundle(champion=7)
    shutil.copytree(overtaken, registry.fetch("blobs", first.version), dirs_exist_ok=True)
    retag(registry, first)
    for reason in ("", "I insist"):
        with pytest.raises(VerdictError, match="they were exchanged"):
            registry.promote("blobs", first.version, override=reason)
    assert registry.get("blobs", CHAMPION).version == second.version


def test_retired_files_stay_retired_under_another_number(registry, register):
    """Registering a retired version's files again does not undo the retirement."""
    champion, retired = register(), register(champion=1)
    registry.promote("blobs", champion.version)
    registry.retire("blobs", retired.version, reason="broken sensor")
    again = register(champion=1)
    with pytest.raises(GateError, match=r"was retired as version 2 by .*: broken sensor"):
        registry.promote("blobs", again.version)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_loading_a_version_never_unpickles(registry, register, tmp_path, monkeypatch):
    """Poisoned pickles in a version's folder are not run: not beside its files, not instead of one.

    The one whose digest was forged too is refused in words.
    """
    version = register()
    trace = tmp_path / "trace"
    bomb = pickle.dumps(Bomb(trace))
    folder = registry.fetch("blobs", version.version)
    for name in ("model.pkl", "python_model.pkl", "weights.pt", "data.pickle", "weights.bin"):
        (folder / name).write_bytes(bomb)
    (folder / "MLmodel").write_text("flavors:\n  python_function:\n    loader_module: pickle\n")
    fetched = registry.fetch("blobs", version.version)
    assert read_parameters(fetched)
    registry.promote("blobs", version.version)
    (folder / WEIGHTS).write_bytes(bomb)
    retag(registry, version)
    with pytest.raises(RegistryError, match="holds no parameters"):
        read_parameters(registry.fetch("blobs", version.version))
    with pytest.raises(VerdictError):
        registry.promote("blobs", version.version)
    assert not trace.exists()
    with contextlib.suppress(TypeError):
        pickle.loads(bomb)
    assert trace.exists(), "the bomb would have gone off"


def test_card_is_read_by_programs(bundle_folder):
    """The card's head is Hugging Face's, with the results; its JSON is the typed value again."""
    text = (bundle_folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    (index,) = head["model-index"]
    (result,) = index["results"]
    card = Card.read(bundle_folder / "card.json")
    assert index["name"] == "blobs"
    assert {one["type"]: one["value"] for one in result["metrics"]} == card.gates.metrics
    assert result["dataset"]["revision"] == card.lineage.data_digest == "d" * 64
    assert card.markdown() == text


def test_card_lets_no_html_through(bundle_folder):
    """A column that is called like a script is text to whatever shows the card as a page."""
    card = Card.read(bundle_folder / "card.json")
    schema = card.data_schema.model_copy(
        update={
            "columns": tuple(
                column.model_copy(update={"name": "<img src=x onerror=alert(1)>"})
                for column in card.data_schema.columns
            )
        }
    )
    text = card.model_copy(update={"data_schema": schema}).markdown()
    assert "<img" not in text
    assert "| &lt;img src=x onerror=alert(1)> | number |" in text
    assert "<= 0." in text, "limits stay as they read"


def test_environment_is_locked(bundle_folder):
    """The version carries every package's version, and the lineage names the lock's digest."""
    lock = (bundle_folder / "environment.txt").read_bytes()
    lineage = Lineage.read(bundle_folder / "lineage.json")
    assert lineage.environment.digest == hashlib.sha256(lock).hexdigest()
    assert f"numpy=={np.__version__}\n" in lock.decode()
    assert lineage.environment.cpu


def test_a_model_need_be_named_among_several_alone(registry, register):
    """Without a name the only model is meant; before the first the way to make one is said."""
    with pytest.raises(RegistryError, match="minga run"):
        registry.only_name()
    register()
    assert registry.only_name() == "blobs"
    register("other")
    assert registry.only_name("other") == "other"
    with pytest.raises(RegistryError, match="blobs, other: name one"):
        registry.only_name()


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


def test_many_models_are_all_named(registry, tracking_uri, monkeypatch):
    """MLflow tells of a limited number at a time; none is left out."""
    from mlflow import MlflowClient

    names = tuple(f"model-{number}" for number in range(5))
    for name in names:
        MlflowClient(tracking_uri, tracking_uri).create_registered_model(name)
    monkeypatch.setattr("minga.training.registry._PAGE", 2)
    assert registry.names() == names
