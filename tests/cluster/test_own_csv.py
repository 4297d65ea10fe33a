"""A new user's path: the steps of the how-to, in their order, on a table of one's own.

Only `task.py` and `minga.toml` are edited: to what `docs/how-to/start-from-your-csv.md` shows, with
fewer trials and epochs, so that the test is over soon.
"""

import asyncio
import csv
import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from minga.cli.app import main
from minga.cli.project import _show_selection
from minga.cluster import pipeline
from minga.cluster.project import load
from minga.cluster.reproduction import reproduce
from minga.cluster.response.alarms import Alarm
from minga.cluster.response.journal import Journal
from minga.cluster.response.looking import see_agreement
from minga.cluster.response.policy import SIGNATURES, Kind
from minga.cluster.response.responder import JOURNAL_FILE, Responder, folder_of, open_journal
from minga.cluster.response.work import work
from minga.cluster.selecting import select_model
from minga.training.bundle import LINEAGE, WEIGHTS
from minga.training.lineage import Lineage
from minga.training.signing import Keyring

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "start-from-your-csv.md"
REAL = ROOT.parent / "shared" / "data" / "ai4i2020.csv.gz"
NUM_ROWS = 2000

pytestmark = pytest.mark.slow


def block(language, containing):
    """A fenced block of the page."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), flags=re.M | re.S)
    return next(one for one in found if containing in one)


def write_table(file):
    """Write the page's table: rows of the real set if it is there, else made-up ones."""
    columns = block("text", "torque_nm").splitlines()[0].split(",")
    if REAL.exists():
        with gzip.open(REAL, "rt") as real:
            rows = [[row[name] for name in columns] for row in csv.DictReader(real)][::5]
    else:
        generator = np.random.default_rng(0)
        torque, wear = generator.normal(40, 10, NUM_ROWS), generator.integers(0, 250, NUM_ROWS)
        danger = (torque - 40) / 10 + (wear - 125) / 70 - 2.5
        failure = (generator.random(NUM_ROWS) < 1 / (1 + np.exp(-4 * danger))).astype(int)
        kinds = generator.choice(list("LMH"), NUM_ROWS)
        rows = [
            [kind, round(298 + noise, 1), round(309 + noise, 1), 1500, round(t, 1), w, f]
            for kind, noise, t, w, f in zip(
                kinds, generator.normal(size=NUM_ROWS), torque, wear, failure, strict=True
            )
        ]
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([columns, *rows])


def run(*words):
    """Run a command in this process; gives its exit code."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code


@pytest.fixture(scope="module")
def plant(ray_cluster, with_database, tmp_path_factory):
    """A project after `minga init`, the two edits and the page's commands."""
    folder = tmp_path_factory.mktemp("user") / "plant"
    assert run("init", folder) == 0
    write_table(folder / "data" / "machines.csv")
    (folder / "task.py").write_text(block("python", "class MachineFailure"))
    settings = block("toml", "machines.csv") + "\n[selection]\nfolds = 3\n"
    fewer = {"num_trials = 6": "num_trials = 2", "num_workers = 2": "num_workers = 1"}
    fewer |= {"max_epochs = 8": "max_epochs = 3", "epochs = 20": "epochs = 8"}
    for old, new in fewer.items():
        settings = settings.replace(old, new)
    (folder / "minga.toml").write_text(settings)
    return with_database(folder)


@pytest.fixture(scope="module")
def after_run(plant):
    """The same after `minga data check` and `minga run`."""
    for words in (("data", "check"), ("run",)):
        assert run(*words, "--project", plant) == 0
    return plant


def test_page_is_all_it_takes(after_run, capsys):
    """The table's own model is registered, passed its gates, and is champion, as its card says."""
    run("model", "show", "--project", after_run, "--json")
    shown = json.loads(capsys.readouterr().out)
    assert (shown["model"], shown["version"], shown["aliases"]) == (
        "machine-failure",
        1,
        ["champion"],
    )
    assert shown["blessed"]
    assert shown["metrics"]["roc_auc"] > 0.85
    assert {"runs in serving", "runs in device"} <= {gate["name"] for gate in shown["gates"]}
    assert (Path(shown["path"]) / WEIGHTS).exists()


def test_kinds_of_models_are_compared(after_run, capsys):
    """`minga run --auto` ranks contenders, trains the chosen one, and registers it judged.

    The table is in the answer and in MLflow, where each contender has a nested run.
    """
    run("run", "--auto", "--project", after_run, "--json")
    found = json.loads(capsys.readouterr().out)
    selection = found["selection"]
    assert not selection["failures"]
    names = [one["name"] for one in selection["standings"]]
    assert sorted(names) == ["boosting", "linear", "mlp", "own"]
    assert selection["best"] == names[0]
    assert found["version"] == 2
    assert {"onnx parity", "runs in device"} <= {gate["name"] for gate in found["gates"]}
    tracker = load(after_run).tracker()
    runs = tracker.client.search_runs([tracker.experiment_id], "tags.`minga.step` = 'compare'")
    nested = tracker.children(runs[0].info.run_id)
    assert nested.keys() == set(names)
    history = tracker.client.get_metric_history(nested["boosting"], "roc_auc")
    boosting = next(one for one in selection["standings"] if one["name"] == "boosting")
    assert [one.value for one in history] == pytest.approx(boosting["values"])
    told = []
    kept, _ = select_model(
        load(after_run), pipeline.finished_search(load(after_run)).params, told.append
    )
    assert "kept from an earlier comparison" in told[0].note
    _show_selection(kept)
    assert f"chosen: {selection['chosen']}" in capsys.readouterr().out


def test_comparison_goes_on_after_an_interruption(after_run):
    """What was fitted before Ctrl-C is kept; the same call fits only what is missing."""
    project = load(after_run)
    project = project.model_copy(
        update={"selection": project.selection.model_copy(update={"contenders": ("boosting",)})}
    )
    project._directory = after_run
    params = project.loaded_task.defaults

    def stop(progress):
        if progress.step == "compare" and progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"2 of 3 fits are kept.*same command goes on"):
        select_model(project, params, stop)
    told = []
    selection, chosen = select_model(project, params, told.append)
    steps = [one.done for one in told if one.step == "compare"]
    assert steps == [2, 3]
    assert (selection.chosen, chosen) == ("boosting", {"architecture": "boosting"})
    runs = project.tracker().client.search_runs(
        [project.tracker().experiment_id], "tags.`minga.step` = 'compare'"
    )
    assert len([one for one in runs if one.data.tags.get("minga.chosen") == "boosting"]) == 1


def test_trees_take_the_whole_path(after_run, capsys):
    """Boosted trees are registered, explained, judged anew and reproduced; and not federated."""
    project = load(after_run)
    trained = pipeline.train(project, {"architecture": "boosting"})
    registered = pipeline.register_trained(project, trained)
    assert not (registered.bundle_path / WEIGHTS).exists()
    assert Lineage.read(registered.bundle_path / LINEAGE).params == {"architecture": "boosting"}
    gates = {gate.name: gate.passed for gate in registered.report.gates}
    assert gates["onnx parity"]
    assert gates["runs in serving"]
    assert gates["runs in device"]
    words = ["--project", str(after_run)]
    run("explain", registered.version, *words, "--rows", "20", "--json")
    explained = json.loads(capsys.readouterr().out)
    assert explained["method"] == "occlusion"
    assert {"type", "torque_nm"} < set(explained["importance"])
    again = pipeline.judge_anew(project, registered.version)
    assert again.metrics == registered.metrics
    version = project.registry().get("machine-failure", registered.version)
    assert reproduce(project, version).is_equal
    assert run("simulate", "--start", registered.version, *words) == 16
    assert "no network but 'boosting'" in capsys.readouterr().err


def test_columns_are_proposed_and_left_out(after_run, capsys):
    """`minga data features` proposes columns; with them in minga.toml a model takes whole rows."""
    run("data", "features", "--project", after_run, "--json")
    found = json.loads(capsys.readouterr().out)
    assert {"torque_nm", "tool_wear_min"} <= set(found["proposed"])
    file = after_run / "minga.toml"
    before = file.read_text()
    names = ", ".join(f'"{name}"' for name in found["proposed"])
    file.write_text(before.replace("[data]\n", f"[data]\nfeatures = [{names}]\n"))
    try:
        project = load(after_run)
        trained = pipeline.train(project, project.loaded_task.defaults)
        assert trained.params["features"] == ",".join(found["proposed"])
        assert "preparation.chosen.ordinary" in trained.parameters
        metrics = pipeline.evaluate(project, trained.parameters, trained.params)
    finally:
        file.write_text(before)
    assert metrics["roc_auc"] > 0.8


def test_trees_need_a_second_person_and_are_retrained_on_an_alarm(
    after_run, capsys, monkeypatch, tmp_path
):
    """Approvals at the command line, and an alarm about a champion that is no network.

    Who registered a version cannot approve it, a second person can, and then it is promoted. The
    version that an alarm makes waits for people too, and says so; a responder that is started anew
    finds their approval, and the case goes on.
    """
    project = load(after_run)
    bob = Keyring.open(tmp_path / "bob.pem")
    keys = json.dumps([project.keyring.public_key, bob.public_key])
    file = after_run / "minga.toml"
    before = file.read_text()
    rule = f"[gates]\napprovals = 1\ntrusted_keys = {keys}\n\n[gates.floors]"
    alarms = '\n[respond]\nalarms = ["InputsMoved"]\nport = 0\n'
    file.write_text(before.replace("[gates.floors]", rule) + alarms)
    words = ("--project", after_run)
    try:
        project = load(after_run)
        made = pipeline.train(project, {"architecture": "boosting"})
        registered = pipeline.register_trained(project, made)
        assert not pipeline.promote_if_allowed(project, registered)
        which = registered.version
        assert run("model", "promote", which, *words) == 53
        assert run("model", "approve", which, *words) == 53
        monkeypatch.setenv("MINGA_SIGNING_KEY", str(tmp_path / "bob.pem"))
        assert run("model", "approve", which, "--comment", "saw it", *words) == 0
        monkeypatch.delenv("MINGA_SIGNING_KEY")
        assert run("model", "promote", which, *words) == 0
        capsys.readouterr()
        run("model", "show", which, *words, "--json")
        shown = json.loads(capsys.readouterr().out)
        assert (shown["aliases"], len(shown["approved_by"])) == (["champion"], 1)
        journal = open_journal(project)
        heard = Alarm(
            fingerprint="a",
            name="InputsMoved",
            model="machine-failure",
            version=str(which),
            summary="",
            since=1000.0,
            is_firing=True,
            origin="monitor",
        )
        number = journal.open_case((heard,), "retrain")
        work(project, journal, number)
        waiting = journal.story(number)
        shutil.copy(journal_of(project), tmp_path / "copy.db")
        journal.close()
        expires(project, tmp_path / "copy.db", number)
        assert run("respond", "approve", number, *words) == 52
        monkeypatch.setenv("MINGA_SIGNING_KEY", str(tmp_path / "bob.pem"))
        assert run("model", "approve", which + 1, *words) == 0
        monkeypatch.delenv("MINGA_SIGNING_KEY")
        told = asyncio.run(responded(load(after_run)))
    finally:
        file.write_text(before)
    judged = next(one.detail for one in waiting if one.kind is Kind.JUDGED)
    assert judged["blessed"], judged
    assert judged["version"] == which + 1
    assert waiting[-1].kind is Kind.WAITING
    assert "has 0 of 1 approvals" in waiting[-1].detail["reason"]
    assert told == [*(one.kind for one in waiting), Kind.AGREED, Kind.STARTED, Kind.PROMOTED]
    assert project.registry().get("machine-failure", "champion").version == which + 1


def journal_of(project):
    """The file of a project's journal."""
    return folder_of(project) / JOURNAL_FILE


def expires(project, file, number):
    """A case waits as long as it may, and not longer; told in a copy of the journal."""
    copy = Journal(file)
    until = copy.case(number).done[Kind.WAITING]["until"]
    see_agreement(project, copy, copy.case(number), until - 1)
    assert copy.case(number).awaited(project.respond) == SIGNATURES
    see_agreement(project, copy, copy.case(number), until)
    assert copy.case(number).end is Kind.EXPIRED
    copy.close()


async def responded(project):
    """Run a new responder until the case has ended; gives the kinds of the case's entries."""
    journal = open_journal(project)
    running = asyncio.create_task(Responder(project, journal).run())
    async with asyncio.timeout(120):
        while not running.done() and journal.cases()[-1].end is None:
            await asyncio.sleep(0.2)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    told = [one.kind for one in journal.story(journal.cases()[-1].number)]
    journal.close()
    return told
