"""What operators watch Minga with, by the real programs: promtool, Prometheus, Alertmanager."""

import contextlib
import hashlib
import json
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from minga.cli.app import main
from minga.cluster import observability, template
from minga.cluster.observability import Targets, dashboard, write
from minga.federation import wire
from minga.federation.aggregation.ledger import Budget
from minga.federation.aggregation.privacy import Privacy
from minga.federation.parameters import to_bytes
from tests.cluster.watched import (
    LocalMinga,
    Processes,
    Prometheus,
    alertmanager,
    asked,
    observe,
    program,
    until,
)
from tests.federation.fleet import campaign_plan, toy_model
from tests.serving.watched import rows, watched_model

PACKAGE = Path(observability.__file__).parent
DEVICES = ("press-1", "press-2", "press-3")
MODEL = "watched"
READY = r"ready at (http[^;]+)"
RESPOND = """
[respond]
alarms = ["MingaServingDown"]
approval = "start"
port = 0

[serving.monitor]
window_rows = 50
flush_s = 0.2
"""


def run(name: str, *words: str, text: bytes | None = None) -> str:
    """Run a program that is to be content; give what it wrote."""
    done = subprocess.run(
        [program(name), *words], cwd=PACKAGE, input=text, capture_output=True, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_rules_do_what_their_tests_say() -> None:
    """Each alert fires when it should and not before; `promtool test rules` holds it."""
    assert "SUCCESS" in run("promtool", "test", "rules", "rules/tests.yml")
    tests = (PACKAGE / "rules" / "tests.yml").read_text()
    alerts = (PACKAGE / "rules" / "alerts.yml").read_text()
    names = [line.split()[-1] for line in alerts.splitlines() if "- alert:" in line]
    assert len(names) > 10
    untested = [name for name in names if tests.count(f"alertname: {name}\n") < 1]
    assert not untested


def test_files_are_written_and_valid(tmp_path: Path) -> None:
    """What `minga observe` writes is what Prometheus and Alertmanager take."""
    targets = Targets(
        serving=["a:8000"],
        coordinator=["c:9464"],
        devices={"press-7": "10.0.0.7:8080"},
        respond=["r:8070"],
        alertmanager=["m:9093"],
    )
    token = tmp_path / "token"
    token.write_text("secret")
    files = write(tmp_path, targets, url="http://r:8070/alerts", token_file=token)
    assert {str(file.relative_to(tmp_path)) for file in files} == {
        *observability.FILES,
        *targets.files(),
    }
    run("promtool", "check", "config", str(tmp_path / "prometheus.yml"))
    run("amtool", "check-config", str(tmp_path / "alertmanager.yml"))
    assert "secret" not in (tmp_path / "alertmanager.yml").read_text()
    devices = json.loads((tmp_path / "targets" / "devices.yml").read_text())
    assert devices == [{"targets": ["10.0.0.7:8080"], "labels": {"device": "press-7"}}]


def test_changed_files_are_kept(tmp_path: Path, capsys, monkeypatch) -> None:
    """A second call changes nothing; a rule that an operator changed is not written over."""
    template.write(tmp_path / "plant")
    monkeypatch.chdir(tmp_path / "plant")

    def written(*words: str) -> list[str]:
        with contextlib.suppress(SystemExit):
            main(["observe", *words, "--json"])
        return json.loads(capsys.readouterr().out)

    assert len(written("--device.press-7", "10.0.0.7:8080")) == 13
    assert written() == []
    assert "10.0.0.7" in Path("observe/targets/devices.yml").read_text()
    rules = Path("observe/rules/alerts.yml")
    rules.write_text(rules.read_text().replace("> 0.5", "> 0.1"))
    with pytest.raises(SystemExit) as ending:
        main(["observe"])
    assert ending.value.code == 10
    assert "--replace" in capsys.readouterr().err
    assert written("--replace") == ["observe/rules/alerts.yml"]
    token = Path(".minga/respond/token")
    assert token.stat().st_mode & 0o777 == 0o600


def test_dashboard_is_the_one_that_is_built() -> None:
    """The committed JSON is what the foundation SDK makes of the code."""
    committed = (PACKAGE / dashboard.FILE).read_text()
    assert committed == dashboard.build(), "python -m minga.cluster.observability.dashboard"


# --- with everything running ---


def register(uri: str, folder: Path) -> bytes:
    """Register a model that can be watched as champion; gives it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    content = watched_model()
    bundle = folder / "bundle"
    bundle.mkdir(parents=True)
    (bundle / "model.onnx").write_bytes(content)
    location = (folder / "artifacts").as_uri()
    run = client.create_run(client.create_experiment(MODEL, artifact_location=location))
    client.log_artifacts(run.info.run_id, str(bundle), "bundle")
    client.create_registered_model(MODEL)
    version = client.create_model_version(
        MODEL,
        f"{run.info.artifact_uri}/bundle",
        run.info.run_id,
        tags={"minga.onnx_sha256": hashlib.sha256(content).hexdigest()},
    )
    client.set_registered_model_alias(MODEL, "champion", version.version)
    return content


def private_campaign():
    """A plan with noise, of a model large enough for links to be measured."""
    privacy = Privacy(
        budget=Budget(epsilon=50.0, delta=1e-5),
        noise_multiplier=1.0,
        max_norm=1.0,
        is_distributed=False,
    )
    return campaign_plan(cohort=3, privacy=wire.privacy_to_wire(privacy), num_rounds=1)


@dataclass
class Watched:
    """Everything, running."""

    minga: LocalMinga
    prometheus: Prometheus
    processes: Processes
    project: Path
    respond_url: str


@pytest.fixture(scope="module")
def watched(registry_uri, tmp_path_factory):
    """Serving, coordinator, devices and responder, scraped by a Prometheus that tells alarms."""
    program("prometheus")
    folder = tmp_path_factory.mktemp("watched")
    project = folder / "plant"
    template.write(project)
    with (project / "minga.toml").open("a") as settings:
        settings.write(RESPOND)
    patch = pytest.MonkeyPatch()
    patch.setenv("MINGA_TRACKING_URI", registry_uri)
    content = register(registry_uri, folder / "registered")
    with Processes(folder / "logs") as processes:
        local = ("--port", "0", "--engine", "local")
        processes.minga("serving", "serve", MODEL, "--project", str(project), *local)
        processes.minga("respond", "respond", "run", "--project", str(project))
        minga = LocalMinga(processes, folder)
        minga.add_devices(*DEVICES)
        minga.urls["serving"] = processes.said("serving", READY)
        url = processes.said("respond", READY)
        minga.operate(lambda operator: operator.publish_model(MODEL, "1", content, "default"))
        token = project / ".minga" / "respond" / "token"
        port = observe(folder / "observe", minga, url=url, token_file=token)
        prometheus = Prometheus(processes, folder / "observe")
        alertmanager(processes, folder / "observe", port)
        askable = {name: url for name, url in minga.urls.items() if name != "coordinator"}
        with asked(askable, MODEL, rows(50, seed=7)):
            until(
                lambda: list(prometheus.targets().values()) == ["up"] * 6,
                "all are scraped",
                seen=prometheus.targets,
            )
            model = to_bytes(toy_model(200_000))
            name = minga.operate(lambda o: o.start_campaign(private_campaign(), model))
            minga.operate(lambda operator: _finished(operator, name))
            yield Watched(minga, prometheus, processes, project, url.removesuffix("/alerts"))
    patch.undo()


async def _finished(operator, name: str) -> None:
    async for campaign in operator.watch(name):
        last = campaign
    assert not last.reason


@pytest.mark.slow
def test_every_process_is_scraped(watched: Watched) -> None:
    """Prometheus finds all processes through the lists of targets, and they are up."""
    jobs = [name.partition("/")[0] for name in watched.prometheus.targets()]
    assert sorted(jobs) == [
        "minga-coordinator",
        *["minga-devices"] * 3,
        "minga-respond",
        "minga-serving",
    ]
    assert set(watched.prometheus.targets().values()) == {"up"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["serving", "coordinator", "press-1", "respond"])
def test_expositions_are_the_fields_way(watched: Watched, name: str) -> None:
    """`promtool check metrics` finds nothing to say about any name, type or help."""
    urls = {**watched.minga.urls, "respond": watched.respond_url}
    exposition = httpx.get(f"{urls[name]}/metrics").content
    assert b"minga_" in exposition
    assert run("promtool", "check", "metrics", text=exposition).strip() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("title", "expr"),
    [
        pytest.param(panel.title, query.expr, id=f"{panel.title}-{index}")
        for panels in dashboard.ROWS.values()
        for panel in panels
        for index, query in enumerate(panel.queries)
    ],
)
def test_every_query_of_the_dashboard_finds_something(
    watched: Watched, title: str, expr: str
) -> None:
    """A panel's query gives numbers from the series of processes that run and train."""
    query = expr.replace("$__rate_interval", "1m").replace("$model", ".*")
    assert "$" not in query
    until(lambda: watched.prometheus.ask(query), f"{title}: {query}", patience_s=15)


@pytest.mark.slow
def test_an_alert_becomes_a_line_of_the_story(watched: Watched, capsys) -> None:
    """A server is killed: Prometheus fires, Alertmanager tells, and the responder opens a case."""
    watched.processes.stop("serving", signal.SIGKILL)

    def story() -> list[dict]:
        with contextlib.suppress(SystemExit):
            main(["respond", "story", "--project", str(watched.project), "--json"])
        return json.loads(capsys.readouterr().out)

    until(lambda: len(story()) > 1, "the alert is heard")
    heard, opened = story()[:2]
    assert (heard["kind"], heard["name"]) == ("alarm", "MingaServingDown")
    assert heard["origin"] == "alertmanager"
    assert heard["summary"].endswith("answers no requests")
    assert (opened["kind"], opened["case"]) == ("opened", 1)
    firing = watched.prometheus.ask('ALERTS{alertname="MingaServingDown",alertstate="firing"}')
    assert len(firing) == 1
