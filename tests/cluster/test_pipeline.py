"""The whole central path on a small sample, on a real Ray and a real registry."""

import asyncio
import contextlib
import hashlib
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.graph_pb2 import GraphDef

from minga.cluster import pipeline
from minga.cluster.checking import check_data
from minga.cluster.federate import federate, personal_of
from minga.cluster.fleet import committed
from minga.cluster.learning import picture_of
from minga.cluster.project import load
from minga.federation.flower.folder import TRAINER, client_app_of
from minga.federation.parts import split_personal
from minga.federation.v1 import federation_pb2 as pb
from minga.inference.app import InferenceApp
from minga.inference.client import InferenceClient
from minga.inference.repository import ModelRepository
from minga.training import choice
from minga.training.bundle import GATES, LINEAGE, MODEL, read_parameters
from minga.training.errors import GateError
from minga.training.gates import GateReport
from minga.training.lineage import Campaign, Lineage
from minga.training.network import build_network, parameters_of
from minga.training.stored import StoredRows
from tests.events import events_of, points_of
from tests.federation.fleet import Fleet
from tests.serving.conftest import ref_of, serving

pytestmark = pytest.mark.slow

FLOWER = """
[federation.flower]
client_app = "client_app:app"
strategy = "flwr.server.strategy:FedMedian"

[federation]
num_rounds = 2
protection = "plain"
invite_timeout_s = 1
"""


ON_DISK = """

class OnDisk(ShuttleAnomaly):
    def data(self, source):
        from pathlib import Path
        from minga.training import Split
        from minga.training.stored import RowWriter, StoredRows

        splits = super().data(source)
        moved = {}
        for name in ("train", "validation", "test"):
            file = Path(source).with_suffix(f".{name}.npy")
            with RowWriter(file, splits[name].inputs.shape[1:], np.float32) as writer:
                writer.add(splits[name].inputs)
            moved[name] = Split(inputs=StoredRows(file), targets=splits[name].targets)
        return Splits(**moved)

    def slices(self, split):
        return {"high first column": split.inputs[:, 0] > 0.0}
"""


@pytest.fixture
def project(finished):
    """The project, freshly loaded."""
    return load(finished[0].directory)


def champion_of(project):
    """Parameters and hyper-parameters of version 1."""
    folder = project.registry().fetch("shuttle-anomaly", 1)
    return read_parameters(folder), Lineage.read(folder / LINEAGE)


def test_run_ends_with_a_champion(finished, project):
    """The run prints one JSON value: a blessed version that is champion now.

    What both runtimes have tried is the very file that is registered.
    """
    _, printed = finished
    assert (printed["model"], printed["version"]) == ("shuttle-anomaly", 1)
    assert printed["promoted"]
    assert printed["metrics"]["average_precision"] > 0.9
    report = GateReport.read(project.registry().fetch("shuttle-anomaly", 1) / GATES)
    digest = project.registry().get("shuttle-anomaly", 1).digests.onnx[:12]
    tried = [gate for gate in report.gates if gate.name.startswith("runs in")]
    assert len(tried) == 2
    assert all(digest in gate.seen for gate in tried)
    assert len(printed["trials"]) == 3
    assert {gate["name"] for gate in printed["gates"]} >= {
        "onnx parity",
        "latency p95",
        "size",
        "noise of 0.1",
        "10% of values missing",
        "calibration error",
        "runs in serving",
        "runs in device",
    }
    assert project.registry().get("shuttle-anomaly", "champion").version == 1


def test_registered_parameters_are_the_model(finished, project):
    """The stored parameters, put into a network, reach the metrics that were registered."""
    parameters, lineage = champion_of(project)
    measured = pipeline.evaluate(project, parameters, lineage.params)
    assert measured == pytest.approx(finished[1]["metrics"])
    assert lineage.params == finished[1]["params"]
    assert lineage.data_digest == finished[1]["data"]["digest"]


def test_finished_search_is_kept(project, monkeypatch):
    """The same search again gives the same result without a trial; other settings do not."""
    found = pipeline.search(project)
    assert found == pipeline.finished_search(project)
    assert len(found.trials) == 3
    other = project.model_copy(update={"seed": 8})
    other._directory = project.directory
    assert pipeline.finished_search(other) is None


def test_runs_are_recorded(finished, project):
    """MLflow has the search with its trials nested, and the training with its history."""
    tracker = project.tracker()
    runs = tracker.client.search_runs([tracker.experiment_id])
    names = sorted(run.info.run_name for run in runs)
    assert names[:5] == ["search", "train", "trial 1", "trial 2", "trial 3"]
    search = next(run.info.run_id for run in runs if run.info.run_name == "search")
    assert tracker.children(search).keys() == {"trial 1", "trial 2", "trial 3"}
    assert [file.path for file in tracker.client.list_artifacts(search)] == [
        "minga.json",
        "search.html",
    ]
    assert "3 trials" in picture_of(project).read_text()
    training = tracker.client.get_run(finished[1]["run_id"])
    assert training.data.metrics["test_average_precision"] > 0.9
    epochs = tracker.client.get_metric_history(training.info.run_id, "average_precision")
    assert [metric.step for metric in epochs] == [1, 2, 3, 4, 5, 6]
    boards = project.tensorboard_folder
    curve = points_of(boards / f"train-{training.info.run_id[:8]}", "average_precision")
    assert curve.keys() == {1, 2, 3, 4, 5, 6}
    for name, trial in tracker.children(search).items():
        logged = tracker.client.get_metric_history(trial, "train_loss")
        curve = points_of(boards / f"search-{search[:8]}" / name, "train_loss")
        assert 1 in curve
        assert curve == pytest.approx({metric.step: metric.value for metric in logged})


def test_version_is_drawn_for_tensorboard(finished, project):
    """A version's graph, from input to output, and a row to compare it with others."""
    events = list(events_of(project.tensorboard_folder / "version-1"))
    (drawn,) = (event.graph_def for event in events if event.graph_def)
    nodes = {node.name: node for node in GraphDef.FromString(drawn).node}
    assert (nodes["input"].op, "output" in nodes) == ("Input", True)
    assert all(source in nodes for node in nodes.values() for source in node.input)
    tags = {value.tag: value for event in events for value in event.summary.value}
    reached = finished[1]["metrics"]["average_precision"]
    assert tags["test_average_precision"].simple_value == pytest.approx(reached)
    assert b"hidden" in tags["_hparams_/session_start_info"].metadata.plugin_data.content


def test_best_points_of_earlier_searches_are_found(project):
    """A warm start takes the best trials that MLflow has, as far as they lie in the space.

    Trainings tell nothing of campaigns: a search over simulations starts from none of them.
    """
    from minga.training.search.runs import earlier_points

    task, trials = project.loaded_task, pipeline.finished_search(project).trials
    best = max(trials, key=lambda trial: trial.metrics["average_precision"])
    points = earlier_points(project.tracker(), task, 2, over="training")
    assert earlier_points(project.tracker(), task, 2, over="simulation") == []
    assert len(points) == 2
    assert points[0] == {name: best.params[name] for name in task.search_space}
    narrow = type("Narrow", (type(task),), {"search_space": {"hidden": choice([3, 5])}})()
    assert earlier_points(project.tracker(), narrow, 2, over="training") == []


def test_runs_name_their_data(finished, project):
    """Runs and lineage carry the digest of the values and of the file that they were read from."""
    tags = project.tracker().client.get_run(finished[1]["run_id"]).data.tags
    _, lineage = champion_of(project)
    (version,) = lineage.data_versions
    assert tags["minga.data_sha256"] == lineage.data_digest
    assert version.sha256 == hashlib.sha256(Path(project.source).read_bytes()).hexdigest()


def test_later_data_is_checked_against_the_champion(project):
    """Data whose columns moved is judged by what the champion was trained on."""
    source = project.directory / "data" / "moved.csv"
    table = np.loadtxt(project.source, delimiter=",", skiprows=1)
    table[:, 0] += 100
    np.savetxt(source, table, fmt="%g", delimiter=",", header="x", comments="")
    report = check_data(project, "data/moved.csv")
    assert report.reference == "version 1"
    assert {(found.kind, found.path) for found in report.violations} >= {
        ("range", "train.f1"),
        ("drift", "train.f1"),
    }


def test_worse_model_is_registered_but_not_promoted(project):
    """An untrained network is refused by floors and by the champion, and stays a candidate."""
    task = project.loaded_task
    network = build_network(task, task.defaults, project.splits.train, seed=1)
    registered = pipeline.register_candidate(
        project, parameters=parameters_of(network), params=task.defaults
    )
    refused = {gate.name for gate in registered.report.refused}
    assert {"average_precision", "average_precision against champion"} <= refused
    with pytest.raises(GateError, match=f"minga model show {registered.version}"):
        pipeline.promote(project, registered.version)
    assert project.registry().get("shuttle-anomaly", "champion").version == 1


def test_product_of_a_campaign_takes_the_same_gates(project):
    """Federated parameters are compared with the champion and keep their lineage."""
    parameters, lineage = champion_of(project)
    campaign = Campaign(
        name="c1", rounds=5, cohort=7, num_examples=36_000, evaluations={5: {"loss": 0.25}}
    )
    registered = pipeline.register_candidate(
        project,
        parameters=parameters,
        params=lineage.params,
        parent_version=1,
        campaign=campaign,
    )
    stored = Lineage.read(registered.bundle_path / LINEAGE)
    assert registered.report.blessed
    assert (stored.origin, stored.parent_version, stored.campaign) == ("federated", 1, campaign)
    version = project.registry().get("shuttle-anomaly", registered.version)
    assert version.aliases == ("challenger",)
    (measured,) = project.tracker().client.get_metric_history(registered.run_id, "devices_loss")
    assert (measured.step, measured.value) == (5, 0.25)
    gate = next(gate for gate in registered.report.gates if gate.name.endswith("champion"))
    assert gate.seen == "+0.0000 (+0.0000 .. +0.0000) to version 1"


def test_data_on_the_disk_takes_the_same_path(project, tmp_path):
    """Inputs that stay on the disk are checked and judged as those in memory, and are as known."""
    moved = shutil.copytree(project.directory, tmp_path / "plant")
    with (moved / "task.py").open("a") as file:
        file.write(ON_DISK)
    settings = (moved / "minga.toml").read_text().replace(":ShuttleAnomaly", ":OnDisk")
    (moved / "minga.toml").write_text(settings)
    on_disk = load(moved)
    assert isinstance(on_disk.splits.test.inputs, StoredRows)
    assert check_data(on_disk).digest == check_data(project).digest
    parameters, lineage = champion_of(project)
    registered = pipeline.register_candidate(
        on_disk, parameters=parameters, params=lineage.params, parent_version=1
    )
    assert registered.report.blessed
    assert "high first column" in str(registered.report.gates)
    first = GateReport.read(project.registry().fetch("shuttle-anomaly", 1) / GATES)
    assert registered.report.metrics == first.metrics
    assert Lineage.read(registered.bundle_path / LINEAGE).data_digest == lineage.data_digest


def test_personal_tensors_stay_the_parents(project):
    """What a campaign's devices keep to themselves is, in the centre, the parent's."""
    parameters, _ = champion_of(project)
    registry = project.registry()
    parent = registry.get("shuttle-anomaly", 1)
    patterns = ["model.*.bias"]
    campaign = pb.Campaign(plan=pb.CampaignPlan(personal=patterns))
    personal = personal_of(registry, parent, campaign)
    shared, _ = split_personal(parameters, patterns)
    assert personal
    assert shared.keys() | personal.keys() == parameters.keys()
    assert all(np.array_equal(personal[name], parameters[name]) for name in personal)
    assert not personal_of(registry, parent, pb.Campaign())


def test_overtaken_version_is_judged_anew(finished, capsys):
    """A version that was judged before there was this champion gets a verdict against it.

    The verdict is on a new version of the same weights, and `minga model history` tells the rest.
    """
    from minga.cli.app import main

    words = ["--project", str(finished[0].directory), "--json"]
    with contextlib.suppress(SystemExit):
        main(["model", "judge", "1", *words])
    judged = json.loads(capsys.readouterr().out)
    assert (judged["champion"], judged["blessed"]) == (1, True)
    registry = finished[0].registry()
    before, after = (registry.get("shuttle-anomaly", n) for n in (1, judged["version"]))
    assert before.digests.weights == after.digests.weights
    assert before.digests.bundle != after.digests.bundle
    with contextlib.suppress(SystemExit):
        main(["model", "history", *words])
    (promotion,) = json.loads(capsys.readouterr().out)
    assert (promotion["version"], promotion["champion_before"]) == (1, None)


def test_lineage_leads_from_data_to_the_server_and_back(finished, project, capsys):
    """`minga lineage` finds what the data came to, and what a server's answers were made from."""
    from minga.cli.app import main
    from minga.serving.registry_source import RegistrySource
    from minga.serving.service_record import ServiceRecord

    served = RegistrySource(project.tracking_uri).current("shuttle-anomaly")
    record = ServiceRecord(project.tracking_uri, "http://127.0.0.1:8123")
    record.note([served])
    directory = ["--project", str(finished[0].directory)]

    def ask(*words):
        with contextlib.suppress(SystemExit):
            main([*words, *directory, "--json"])
        return json.loads(capsys.readouterr().out)

    digest = finished[1]["data"]["digest"]
    (forward,) = ask("lineage", "--data", digest[:10])
    reached = {node["id"] for node in forward["went_into"]["nodes"]}
    (service,) = (name for name in reached if ":8123/" in name)
    (back,) = ask("lineage", "--place", service.removeprefix("service:"))
    made_from = {node["id"] for node in back["made_from"]["nodes"]}
    assert {f"data:{digest}", "version:shuttle-anomaly/1"} <= made_from
    (period,) = ask("model", "served")
    assert (period["version"], period["until"]) == ("1", "")
    record.close()
    (period,) = ask("model", "served")
    assert period["until"]
    assert "served nowhere" in ask("model", "stale")[-1]["finding"]


def test_champion_is_explained(finished, capsys):
    """`minga explain` gives each column's share in the answers, over the network's gradients."""
    from minga.cli.app import main

    words = ["--project", str(finished[0].directory), "--rows", "20", "--json"]
    with contextlib.suppress(SystemExit):
        main(["explain", *words])
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], len(found["rows"])) == ("gradients", 20)
    assert set(found["importance"]) == {f"f{index}" for index in range(1, 10)}
    assert found["completeness_gap"] < 0.1


def test_anomalies_are_told_as_readings_come(project, tmp_path):
    """A stream of labelled readings, one by one: most anomalies are told, few others, and soon."""
    registry = project.registry()
    onnx = (registry.fetch("shuttle-anomaly", 1) / MODEL).read_bytes()
    repository = ModelRepository()
    repository.apply([ref_of(tmp_path, onnx, "shuttle-anomaly")])
    readings = np.loadtxt(
        project.directory / "data/test.csv", np.float32, delimiter=",", skiprows=1
    )
    alarms, delays_s = [], []
    with serving(InferenceApp(repository)) as url, InferenceClient(url) as client:
        for reading in readings[:2000]:
            start = time.perf_counter()
            answer = client.infer("shuttle-anomaly", {"input": reading[None, :-1]})
            delays_s.append(time.perf_counter() - start)
            alarms.append(answer["output"].item() > 0)
    is_anomaly = readings[:2000, -1] == 1
    alarm = np.array(alarms)
    assert alarm[is_anomaly].mean() > 0.8
    assert alarm[~is_anomaly].mean() < 0.02
    assert np.quantile(delays_s, 0.95) < 0.1


def test_commands_show_the_registry(finished, capsys):
    """`minga model list` and `show` print JSON that names the champion and its gates."""
    from minga.cli.app import main

    words = ["--project", str(finished[0].directory), "--json"]
    with contextlib.suppress(SystemExit):
        main(["model", "list", *words])
    versions = json.loads(capsys.readouterr().out)
    assert {"model": "shuttle-anomaly", "version": 1, "aliases": ["champion"]}.items() <= versions[
        -1
    ].items()
    with contextlib.suppress(SystemExit):
        main(["model", "show", *words])
    shown = json.loads(capsys.readouterr().out)
    assert shown["lineage"]["task"] == "shuttle-anomaly"
    assert shown["blessed"]


async def test_project_with_a_flower_app(project, tmp_path):
    """`minga federate` trains the champion with a Flower app on devices, under a Flower strategy.

    The app knows the network's arrays by their order alone; what standardises inputs stays.
    """
    file = project.directory / "minga.toml"
    before = file.read_text()
    shutil.copy(Path(__file__).with_name("flower_client.py"), project.directory / "client_app.py")
    file.write_text(before.replace("[federation]\n", FLOWER).replace("num_rounds = 5\n", ""))
    try:
        async with Fleet(tmp_path) as fleet:
            assert client_app_of(project.directory) == "client_app:app"
            for site in range(3):
                options = {"project": str(project.directory), "source": project.source}
                await fleet.add(f"site-{site}", options, trainer=TRAINER, allow_plain=True)
            told = []
            result = await asyncio.to_thread(
                federate, load(project.directory), tmp_path / "coordinator", on_campaign=told.append
            )
    finally:
        file.write_text(before)
    assert result.campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    assert len(committed(result.campaign)[-1].survivors) == 3
    client = project.tracker().client
    run_id = result.registered.run_id
    for name, values in (("devices", [3, 3]), ("devices_loss", None)):
        history = client.get_metric_history(run_id, name)
        curve = points_of(project.tensorboard_folder / f"federate-{run_id[:8]}", name)
        assert {point.step: point.value for point in history} == pytest.approx(curve)
        assert values is None or [point.value for point in history] == values
    champion, _ = champion_of(project)
    product = read_parameters(result.registered.bundle_path)
    moved = {name for name, value in product.items() if not np.array_equal(value, champion[name])}
    assert moved == {name for name in champion if name.startswith("model.")}
    assert all(np.abs(product[name] - champion[name]).max() < 0.1 for name in moved)
