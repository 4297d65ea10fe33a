"""From an alarm to the next champion, in real processes that are killed on the way."""

import asyncio
import contextlib
import json
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from sklearn.metrics import average_precision_score

from minga.cli.app import main
from minga.cluster.ancestry import stale_everywhere
from minga.cluster.pipeline import judge_anew
from minga.cluster.project import load
from minga.cluster.response.alarms import Alarm
from minga.cluster.response.policy import DAY_S, Case, Kind
from minga.cluster.response.responder import LOOK_S, Responder, open_journal
from minga.cluster.response.work import work
from minga.cluster.traffic import Traffic
from minga.federation.parameters import to_bytes
from minga.federation.v1 import federation_pb2 as pb
from minga.inference.client import InferenceClient
from minga.inference.monitor.store import Store, Watched, WindowRow
from minga.inference.protocol import InferRequest
from minga.serving.book import Status, Story
from minga.serving.judging import Expectation, stability
from minga.serving.registry_source import RegistrySource
from minga.training.bundle import LINEAGE
from minga.training.lineage import Lineage
from tests.cluster.conftest import UNTOUCHED
from tests.cluster.watched import Processes, until
from tests.federation.fleet import Fleet, campaign_plan, toy_model

pytestmark = pytest.mark.slow

MODEL = "shuttle-anomaly"
READY = r"ready at (http[^;]+)"
RESPOND = """
[respond]
alarms = ["drift"]
source = "data/new/central.csv"
weights = "champion"
port = 0
"""
CANARY = """rollout = "canary"

[serving.comparison]
shares = [0.5]
min_requests = 25
hold_s = 0.0
"""
FEDERATE = """
[respond]
alarms = ["drift"]
action = "federate"
coordinator = "../coordinator"

[federation]
num_rounds = 1
invite_timeout_s = 1
"""


def moved(table: np.ndarray) -> np.ndarray:
    """Give readings of sensors that were replaced: another zero, another scale, upside down."""
    return np.column_stack([200 - 2 * table[:, :-1], table[:, -1]])


def write_new_window(directory: Path) -> None:
    """Write the readings of the new sensors beside the old ones."""
    (directory / "data" / "new").mkdir()
    for name in ("central.csv", "test.csv"):
        table = np.loadtxt(directory / "data" / name, np.float32, delimiter=",", skiprows=1)
        title = (directory / "data" / name).read_text().partition("\n")[0]
        file = directory / "data" / "new" / name
        np.savetxt(file, moved(table), fmt="%g", delimiter=",", header=title, comments="")


@pytest.fixture
def plant(finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project with a champion of its own, whose work joins the session's Ray."""
    import ray

    directory = tmp_path / "plant"
    shutil.copytree(finished[0].directory.with_name(UNTOUCHED), directory)
    write_new_window(directory)
    settings = directory / "minga.toml"
    settings.write_text(settings.read_text().replace("port = 8000\n", "poll_interval_s = 0.2\n"))
    monkeypatch.setenv("MINGA_RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    yield directory
    for process in working(directory):
        process.kill()


def working(directory: Path) -> list[psutil.Process]:
    """Give the processes that work on a case of a project."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if "minga.cluster.response.work" in (process.info["cmdline"] or ())
        and str(directory) in process.info["cmdline"]
    ]


def configure(directory: Path, table: str) -> None:
    """Add tables to a project's settings, in the place of those of the same name."""
    settings = directory / "minga.toml"
    text = settings.read_text()
    if "[federation]" in table:
        text = text.replace("[federation]\nnum_rounds = 5\n", table)
        table = ""
    settings.write_text(text + table)


def alarm(**changes) -> Alarm:
    """Give an alarm of the monitor."""
    values = {"fingerprint": "a", "name": "drift", "model": MODEL, "version": "1"}
    values |= {"summary": "", "since": 1000.0, "is_firing": True, "origin": "monitor"}
    return Alarm(**values | changes)


def told(directory: Path) -> list[str]:
    """Name what a project's story tells, in order."""
    journal = open_journal(load(directory))
    try:
        return [str(entry.kind) for entry in journal.story()]
    finally:
        journal.close()


def asked(url: str, table: np.ndarray) -> tuple[str, np.ndarray]:
    """Ask a served model about readings; give its version and its answers."""
    request = InferRequest(inputs={"input": table[:, :-1]}, binary_outputs=True)
    with InferenceClient(url) as client:
        answer = client.request(MODEL, request)
    return answer.model_version, answer.outputs["output"]


def precision(table: np.ndarray, answers: np.ndarray) -> float:
    """Give the average precision of answers about readings."""
    return average_precision_score(table[:, -1], answers)


def test_a_model_recovers_from_drift_without_a_hand(plant: Path, tmp_path: Path) -> None:
    """Sensors are replaced; the monitor sees it, and what its alarm trains is served and right.

    The champion's weights are trained further. Responder and work are killed in the middle of
    training. Nothing is started twice. Live traffic lets the repair take over in stages, though it
    answers otherwise than the champion by more than a canary commonly may, and none of it fails.
    """
    configure(plant, RESPOND + CANARY.replace("= 25", "= 150") + "max_latency_ratio = 20.0\n")
    old, new = (
        np.loadtxt(plant / f"data/{name}", np.float32, delimiter=",", skiprows=1)
        for name in ("test.csv", "new/test.csv")
    )
    project = load(plant)
    registry = project.registry()
    num_versions = len(registry.list_versions(MODEL))
    with Processes(tmp_path / "logs") as processes:
        local = ("--port", "0", "--engine", "local")
        processes.minga("serving", "serve", MODEL, "--project", str(plant), *local)
        processes.minga("respond", "respond", "run", "--project", str(plant))
        served = processes.said("serving", READY)
        processes.said("respond", READY)
        version, answers = asked(served, old)
        assert precision(old, answers) > 0.9
        _, drifted = asked(served, new)
        assert precision(new, drifted) < 0.7

        def begins() -> bool:
            asked(served, new[:600])  # which the monitor sees as well
            return any((plant / ".minga" / "ray").glob("train-*.run"))

        with Traffic(served, MODEL, new[:, :-1]) as traffic:
            until(begins, "training begins")
            processes.stop("respond", signal.SIGKILL)
            for process in working(plant):
                process.kill()
            processes.minga("respond again", "respond", "run", "--project", str(plant))
            until(lambda: "promoted" in told(plant), "the story ends", 240, lambda: told(plant))
            until(lambda: asked(served, new[:600])[0] != version, "the server swaps")
        _, repaired = asked(served, new)
    assert precision(new, repaired) > 0.9
    assert stability(list(drifted), list(repaired))[0] > project.serving.comparison.max_drift
    story = [kind for kind in told(plant) if kind not in ("alarm", "resolved", "held")]
    assert story == ["opened", "started", "started", "trained", "judged", "canary", "promoted"]
    assert (traffic.tally.num_failures, len(traffic.tally.versions)) == (0, 2)
    assert len(registry.list_versions(MODEL)) == num_versions + 1
    tracker = project.tracker()
    runs = tracker.client.search_runs([tracker.experiment_id], "tags.`minga.case` = '1'")
    assert len(runs) == 1
    champion = registry.get(MODEL, "champion")
    files = registry.fetch(MODEL, champion.version)
    assert str(Lineage.read(files / LINEAGE).parent_version) == version


def test_an_alarm_about_a_former_champion_trains_nothing(plant: Path) -> None:
    """Between an alarm and its case somebody else may have promoted what helps."""
    configure(plant, RESPOND)
    project = load(plant)
    journal = open_journal(project)
    number = journal.open_case((alarm(version="7"),), "retrain")
    work(project, journal, number)
    assert journal.case(number).end is Kind.OVERTAKEN
    journal.close()


async def test_a_champion_that_is_stale_is_an_alarm(plant: Path) -> None:
    """Age and rows make a champion stale; that opens a case within the limits, and not for ever.

    The report of what ages says the same. A dismissed case is not opened again before its time.
    """
    asked = RESPOND.replace('"drift"', '"stale"') + 'approval = "start"\ncooldown_s = 60.0\n'
    configure(plant, asked)
    settings = (plant / "minga.toml").read_text()
    (plant / "minga.toml").write_text(settings.replace("[gates]", "[gates]\nmax_rows = 500"))
    project, clock = load(plant), Clock()
    journal = open_journal(project, clock=clock)
    responder = Responder(project, journal, clock=clock)
    await responder.tick()
    assert journal.story() == ()
    with contextlib.closing(Store(project.monitor_folder)) as store:
        answer(store, rows=501)
    assert any("501 rows" in one.finding for one in stale_everywhere(project))
    await responder.tick()
    assert journal.story() == ()  # the registry is not asked twice a second
    clock.now += LOOK_S
    await responder.tick()
    assert [str(one.kind) for one in journal.story()] == ["alarm", "opened"]
    assert "stale: has answered 501 rows" in journal.story()[0].detail["summary"]
    assert journal.cases()[-1].awaited(project.respond) == "start"
    journal.tell(Kind.DISMISSED, 1, by="ana", reason="the plant stands still")
    for days, num_cases in ((0.1, 1), (89, 1), (91, 2)):
        clock.now = journal.cases()[0].ended_at + days * DAY_S
        await responder.tick()
        assert len(journal.cases()) == num_cases
    assert [one.kind for one in journal.story()][-2:] == [Kind.DISMISSED, Kind.OPENED]
    journal.close()


class Clock:
    """A time that is moved by hand, from now on."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now


def answer(store: Store, rows: int) -> None:
    """Let a monitor have seen rows that version 1 has answered."""
    named = {"model": MODEL, "version": "1", "source": "traffic"}
    state = Watched(**named, reference="", began=None, open={}, number=2, streaks={})
    window = WindowRow(**named, number=1, began=0, ended=1, rows=rows, content={}, judgement={})
    store.close_window(window, state, ())


def test_work_that_cannot_be_done_says_why(plant: Path, capsys) -> None:
    """A window that is not there ends the case as failed, with the reason in the story."""
    configure(plant, RESPOND.replace("data/new", "data/nowhere"))
    project = load(plant)
    journal = open_journal(project)
    number = journal.open_case((alarm(),), "retrain")
    work(project, journal, number)
    work(project, journal, number)
    journal.close()
    with contextlib.suppress(SystemExit):
        main(["respond", "story", "--project", str(plant), "--case", str(number), "--json"])
    *_, last = json.loads(capsys.readouterr().out)
    assert last["kind"] == "failed"
    assert "nowhere" in last["reason"]
    assert told(plant).count("started") == 1


def test_people_are_asked(plant: Path, capsys) -> None:
    """Work that waits for a person begins once that person agrees, and not if it is dismissed."""
    configure(plant, RESPOND + 'approval = "start"\n')
    project = load(plant)
    journal = open_journal(project)
    number = journal.open_case((alarm(version="7"),), "retrain")
    work(project, journal, number)
    assert journal.case(number).attempts == 0

    def run(*words: str) -> int:
        with pytest.raises(SystemExit) as ending:
            main(["respond", *words, "--project", str(plant)])
        return ending.value.code or 0

    assert run("approve", "9") == 52
    assert run("approve", str(number)) == 0
    assert run("approve", str(number)) == 52
    work(project, journal, number)
    assert journal.case(number).end is Kind.OVERTAKEN
    second = journal.open_case((alarm(),), "retrain")
    assert run("dismiss", str(second), "--reason", "the sensors were put back") == 0
    work(project, journal, second)
    assert journal.case(second).end is Kind.DISMISSED
    journal.close()
    capsys.readouterr()


def judged_case(directory: Path) -> int:
    """Open a case whose version, with the champion's weights, passed its gates."""
    project = load(directory)
    found = judge_anew(project, 1)
    journal = open_journal(project)
    number = journal.open_case((alarm(),), "retrain")
    told = {"version": found.version, "champion": 1, "blessed": found.report.blessed, "refused": {}}
    journal.tell(Kind.JUDGED, number, **told)
    journal.close()
    return number


def test_a_canary_that_is_rolled_back_ends_the_case(plant: Path) -> None:
    """What live traffic speaks against is not promoted; the story has the service's reason.

    Where all new champions come in stages this one does too, though no canary was asked for.
    """
    configure(plant, RESPOND + CANARY.replace('rollout = "canary"', "") + "new_champions = true\n")
    project = load(plant)
    number = judged_case(plant)
    book = RegistrySource(project.tracking_uri).book()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(_work, plant, number)
        plan = until(lambda: book.read(MODEL)[0], "a canary is asked for")
        assert plan.expects is Expectation.REPAIR
        values = {"plan": plan.id, "mode": plan.mode, "baseline": "1", "challenger": plan.version}
        values |= {"share": 0.5, "since": "2026-11-23T14:00:00Z", "reason": "it fails 9 of 50"}
        book.write(MODEL, Story(status=Status.ROLLED_BACK, **values))
        working.result(60)
    journal = open_journal(project)
    case = journal.case(number)
    journal.close()
    assert case.end is Kind.ROLLED_BACK
    assert case.done[Kind.ROLLED_BACK]["reason"] == "it fails 9 of 50"
    assert project.registry().get(MODEL, "champion").version == 1


async def test_an_alarm_starts_one_campaign_that_repairs(plant: Path, tmp_path: Path) -> None:
    """The work of an alarm waits for another's campaign, then devices repair the champion.

    It is killed when its campaign has started, perhaps before that was noted, and starts no second
    one. Devices are told of the new champion.
    """
    configure(plant, FEDERATE)
    settings = plant / "minga.toml"
    settings.write_text(settings.read_text().replace("data/central", "data/new/central"))
    project, clock = load(plant), Clock()
    journal = open_journal(project, clock=clock)
    responder = Responder(project, journal, clock=clock)
    registry = project.registry()
    num_versions = len(registry.list_versions(MODEL))

    async def tick() -> None:
        clock.now += 1
        await responder.tick()
        await asyncio.sleep(0.1)

    def case() -> Case:
        return journal.cases()[-1]

    async with asyncio.timeout(240), Fleet(tmp_path) as fleet:

        async def states() -> dict[str, int]:
            campaigns = (await fleet.operator.status()).campaigns
            return {each.campaign_id: each.state for each in campaigns}

        others = campaign_plan(invite_timeout_s=60.0)  # no device is there to be invited
        other = await fleet.operator.start_campaign(others, to_bytes(toy_model()))
        assert await responder.hear((alarm(),)) == 1
        await tick()
        while Kind.CALLED not in case().done:
            await tick()
        for site in range(3):
            options = {"project": str(plant), "source": project.source}
            trainer = "minga.training.federated:trainer_from_options"
            await fleet.add(f"site-{site}", options, trainer=trainer)
        await fleet.until(lambda devices: sum(one.connected for one in devices) == 3)
        await fleet.operator.cancel(other)
        while len(await states()) == 1:
            await tick()
        for process in working(plant):
            process.kill()
        while case().end is None:
            await tick()
        ended = await states()
    assert case().end is Kind.PROMOTED, case()
    name = case().done[Kind.CAMPAIGN]["campaign"]
    assert ended == {other: pb.CAMPAIGN_STATE_CANCELLED, name: pb.CAMPAIGN_STATE_COMPLETED}
    assert case().done[Kind.CALLED]["known"] == [other]
    assert case().done[Kind.PROMOTED]["devices_told"] == 3
    assert case().attempts == 2
    assert len(registry.list_versions(MODEL)) == num_versions + 1
    journal.close()


def _work(plant: Path, number: int) -> None:
    project = load(plant)
    journal = open_journal(project)
    work(project, journal, number)
    journal.close()
