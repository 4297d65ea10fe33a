"""`minga data` as users run it."""

import json
from pathlib import Path

import numpy as np
import pytest

from minga.cli.app import main
from minga.cli.data import check, report, schema
from minga.cli.failures import exit_code_of
from minga.cluster.checking import require_valid_data
from minga.cluster.federate import take_in
from minga.cluster.project import load
from minga.federation.v1 import federation_pb2 as pb
from minga.training.errors import DataError, SchemaError, TamperedError
from minga.training.federated import trainer_from_options

TASK = """
from pathlib import Path

import numpy as np
import torch

from minga.training import Maximize, Split, Splits, Task


class Plant(Task):
    name = "plant"
    columns = ("torque", "type")
    categories = {"type": ("L", "M", "H")}
    objective = Maximize("accuracy")

    def data(self, source):
        rows = np.loadtxt(source, delimiter=",", skiprows=1)
        parts = [Split(inputs=part[:, :2], targets=part[:, 2]) for part in np.split(rows, [60, 80])]
        return Splits(train=parts[0], validation=parts[1], test=parts[2])

    def model(self, params):
        return torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Flatten(0))

    def loss(self, outputs, targets):
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean((outputs > 0) == (targets > 0.5)))}
"""


def write(file, **changes):
    """Write 100 readings; a changed column has one value throughout."""
    generator = np.random.default_rng(0)
    columns = {
        "torque": generator.normal(40, 10, 100),
        "type": generator.integers(0, 3, 100),
        "failure": generator.integers(0, 2, 100),
    }
    columns |= {name: np.full(100, value) for name, value in changes.items()}
    rows = np.column_stack(list(columns.values()))
    np.savetxt(file, rows, delimiter=",", header=",".join(columns), comments="")


@pytest.fixture
def project(tmp_path):
    """A project whose schema is not kept yet."""
    (tmp_path / "minga.toml").write_text(
        'task = "task.py:Plant"\n[data]\nsource = "readings.csv"\nmax_drift = 5.0\n'
    )
    (tmp_path / "task.py").write_text(TASK)
    write(tmp_path / "readings.csv")
    return tmp_path


def test_schema_is_kept_and_counts_from_then_on(project, capsys):
    """Data that breaks the kept schema is refused, by a code of its own, before it is used."""
    schema(project=project)
    assert "L, M, H" in capsys.readouterr().out
    write(project / "readings.csv", type=7)
    with pytest.raises(SchemaError, match="category is 7, should be one of L, M, H") as caught:
        require_valid_data(load(project))
    assert exit_code_of(caught.value) == 44


@pytest.mark.parametrize(
    "words", ["run", "run --auto", "tune", "train", "simulate", "model judge 1"]
)
def test_every_use_of_data_begins_with_its_check(project, capsys, words):
    """Whatever would learn from data, or judge by it, ends at once where that breaks the schema."""
    schema(project=project)
    write(project / "readings.csv", type=7)
    with pytest.raises(SystemExit) as left:
        main([*words.split(), "--project", str(project)])
    assert left.value.code == 44
    assert "category is 7, should be one of L, M, H" in capsys.readouterr().err
    assert not (project / ".minga").exists()


def test_product_of_a_campaign_is_not_judged_by_broken_data(project):
    """Data that breaks the schema judges no federated model: nothing is registered."""
    schema(project=project)
    write(project / "readings.csv", type=7)
    campaign = pb.Campaign(plan=pb.CampaignPlan(model_name="plant"))
    with pytest.raises(SchemaError):
        take_in(load(project), campaign, {})


def test_violations_are_a_small_file(project, tmp_path, capsys):
    """`--report` writes path, expected, seen and count of each violation; a table says the same."""
    schema(project=project)
    write(project / "other.csv", torque=np.nan)
    with pytest.raises(SchemaError):
        check(project=project, source="other.csv", report=tmp_path / "violations.json")
    written = json.loads((tmp_path / "violations.json").read_text())
    assert written["reference"] == "schema.json"
    assert {
        "severity": "error",
        "kind": "missing",
        "path": "train.torque",
        "expected": "<= 0.00%",
        "seen": "100.00%",
        "count": 60,
    } in written["violations"]
    assert "train.torque" in capsys.readouterr().out


def test_other_schema_is_not_overwritten(project, capsys):
    """A kept schema stays until it is asked to go; then the changes are said."""
    schema(project=project)
    write(project / "readings.csv", torque=40.5)
    with pytest.raises(DataError, match=r"inputs.torque: low is 40.5, was .*schema --replace"):
        schema(project=project)
    schema(project=project, replace=True, tfdv=project / "schema.pbtxt")
    assert "inputs.torque: high is 40.5, was" in capsys.readouterr().out
    assert 'name: "torque"' in (project / "schema.pbtxt").read_text()
    schema(project=project)


def test_broken_schema_is_explained(project):
    """A kept file that is no schema is named, with what to do."""
    (project / "schema.json").write_text("{}")
    with pytest.raises(DataError, match=r"schema.json is no schema: input_shape: Field.*schema$"):
        check(project=project)


def test_device_refuses_data_that_breaks_the_kept_schema(project):
    """A site's data is checked against the project's schema before a device trains on it."""
    schema(project=project)
    options = {"project": str(project), "source": "readings.csv"}
    assert trainer_from_options(options).num_examples == 60
    write(project / "readings.csv", type=7)
    with pytest.raises(SchemaError, match=r"another schema.json"):
        trainer_from_options(options)


def test_example_is_valid_json_schema_document(project):
    """The kept file is plain JSON that people edit."""
    schema(project=project)
    kept = json.loads(Path(project / "schema.json").read_text())
    assert [column["name"] for column in kept["columns"]] == ["torque", "type"]
    assert kept["targets"][0]["categories"] == [0, 1]


def test_report_is_one_page(project, capsys):
    """`minga data report` writes the page, and prints the measures."""
    report(project=project, out=project / "page.html", noise=False)
    assert "tells of the target" in capsys.readouterr().out
    assert (project / "page.html").read_text().startswith("<!doctype html>")
    report(project=project, out=project / "page.html", json=True)
    printed = json.loads(capsys.readouterr().out)
    assert {"check", "measures"} == printed.keys()
    assert len(printed["measures"]["columns"]) == 2


def test_tampered_data_is_refused(project):
    """Data that is not the version that the settings name is not read, by a code of its own."""
    settings = (project / "minga.toml").read_text()
    (project / "minga.toml").write_text(settings + f'sha256 = "{"0" * 64}"\n')
    with pytest.raises(TamperedError) as caught:
        require_valid_data(load(project))
    assert exit_code_of(caught.value) == 45
