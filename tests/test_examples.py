"""The example projects, from an empty folder to a registered and judged model, on made-up data."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minga.cluster import pipeline
from minga.cluster.project import load
from minga.training.bundle import Digests

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(folder.name for folder in EXAMPLES.iterdir() if (folder / "minga.toml").is_file())


def test_examples_are_those_that_are_listed() -> None:
    """Every example has a line in the list of examples, and there are five."""
    listed = (EXAMPLES / "README.md").read_text()
    assert NAMES == [
        "chest-x-ray",
        "credit-default",
        "energy-forecast",
        "load-days",
        "water-circuit",
    ]
    assert all(f"`{name}/`" in listed for name in NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:the real data is not there")
def test_example_ends_with_a_champion(
    name: str, tmp_path: Path, ray_cluster: None, with_database: Callable[[Path], Path]
) -> None:
    """Without its real data an example is searched, trained, passes its gates, and is champion."""
    folder = tmp_path / name
    shutil.copytree(EXAMPLES / name, folder, ignore=shutil.ignore_patterns(".minga", "__pycache__"))
    settings = (folder / "minga.toml").read_text()
    for key, value in {"num_trials": 2, "max_epochs": 2, "grace_epochs": 1}.items():
        settings = re.sub(rf"{key} = \d+", f"{key} = {value}", settings)
    (folder / "minga.toml").write_text(settings)
    project = load(with_database(folder))
    done = pipeline.run(project)
    assert done.promoted, [str(gate) for gate in done.registered.report.refused]
    assert not done.data.errors
    assert project.registry().get(done.registered.name, "champion").version == 1
    assert Digests.of(done.registered.bundle_path).bundle
