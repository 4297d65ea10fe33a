"""`minga watch`: what a user sees of served models, their alarms, and what labels come to."""

import contextlib
import json

import pytest

from minga.cli.app import main
from minga.inference.monitor.keeper import Keeper
from minga.inference.monitor.sketch import Sketch
from minga.inference.monitor.store import Prediction
from minga.inference.monitor.traffic import Traffic
from tests.serving.watched import logits, reference, rows, truths


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a monitor that has seen a drift of one input, and answers that have ids."""
    folder = tmp_path_factory.mktemp("watched") / "monitor"
    with Keeper(folder, on_alarm=lambda _: None) as keeper:
        for number in range(4):
            table = rows(500, number, shift=0.6 if number else 0.0)
            sketch = Sketch(reference())
            sketch.add(table, logits(table))
            predictions = [
                Prediction(request=f"{number}-{place}", place=0, score=float(one), answer=0.0)
                for place, one in enumerate(logits(table))
            ]
            keeper.take(
                [
                    Traffic(
                        model="yes-or-no",
                        version="3",
                        began=1e9 + number,
                        sketch=sketch,
                        predictions=predictions,
                    )
                ]
            )
    return folder


def run(*words: str) -> None:
    """Run a command that is to succeed."""
    with contextlib.suppress(SystemExit):
        main(["watch", *words])


def test_status_tells_what_moved_and_how_good_answers_are(folder, tmp_path, capsys):
    """The drifted column comes first, then estimates beside the test split's; a page, and JSON."""
    page = tmp_path / "watch.html"
    run("status", "--folder", str(folder), "--html", str(page))
    shown = capsys.readouterr().out
    assert "model 'yes-or-no' version 3: 4 windows, the newest of 500 rows" in shown
    table = [line.split() for line in shown.splitlines() if "psi" in line or "shift" in line]
    assert table[0][:2] == ["drift", "first"]
    assert table[0][-1] == "ALARM"
    assert "accuracy estimated: " in shown
    written = page.read_text()
    assert 'class="alarm">drift</td><td>first</td>' in written
    assert "<script" not in written
    assert "http" not in written.replace("http-equiv", "")
    run("status", "--folder", str(folder), "--json")
    (summary,) = json.loads(capsys.readouterr().out)
    assert (summary["windows"], summary["alarms"]["drift"]) == (4, 1)


def test_alarms_are_listed_from_a_number_on(folder, capsys):
    """A line for each alarm; those before a number are left out."""
    run("alarms", "--folder", str(folder), "--json")
    found = json.loads(capsys.readouterr().out)
    assert {"kind": "drift", "subject": "first", "is_raised": True}.items() <= found[0].items()
    run("alarms", "--folder", str(folder), "--after", str(found[-1]["sequence"]))
    assert capsys.readouterr().out == "no alarm\n"
    run("alarms", "--folder", str(folder), "--standing", "--model", "yes-or-no")
    assert "raised" in capsys.readouterr().out


def test_labels_of_a_file_are_joined(folder, tmp_path, capsys):
    """A CSV of labels gives the real performance beside the test split's, once."""
    file = tmp_path / "labels.csv"
    right = truths(rows(500, 0), 7)
    lines = [f"0-{place},{int(value)}" for place, value in enumerate(right)]
    file.write_text("\n".join(["id,label", *lines, "stranger,1"]))
    run("labels", "yes-or-no", str(file), "--folder", str(folder))
    shown = capsys.readouterr().out
    assert "500 labels joined, 1 without a known answer" in shown
    assert "roc_auc" in shown
    run("labels", "yes-or-no", str(file), "--folder", str(folder), "--json")
    again = json.loads(capsys.readouterr().out)
    assert (again["joined"], again["unknown"], again["alarms"]) == (0, 501, [])


def test_what_is_not_there_is_told(folder, tmp_path, capsys):
    """A folder where nothing was watched, and a model that was not, end with their exit code."""
    file = tmp_path / "labels.csv"
    file.write_text("id,label\n")
    for words in (
        ["status", "--folder", str(tmp_path)],
        ["labels", "another", str(file), "--folder", str(folder)],
    ):
        with pytest.raises(SystemExit) as ending:
            main(["watch", *words])
        assert ending.value.code == 51
    said = capsys.readouterr().err
    assert "nothing was watched yet" in said
    assert "never watched here, only: yes-or-no" in said
