"""The example projects, from an empty folder to a registered and judged model, on made-up data."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minga.cluster import pipeline
from minga.cluster.checking import check_data
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


REAL = {
    "chest-x-ray": (4708, 524, 624),
    "credit-default": (18_000, 6_000, 6_000),
    "energy-forecast": (39_803, 13_267, 13_267),
    "load-days": (1_654, 552, 552),
    "water-circuit": (8_400, 7_401, 7_732),
}
"""Examples of the real sets, by split."""


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("error")
def test_example_reads_its_real_data(name: str) -> None:
    """Where the real set is, an example reads all of it, and the check of data finds no error."""
    project = load(EXAMPLES / name)
    if not Path(project.source).exists():
        pytest.skip(f"{project.source} is not there")
    splits = project.splits
    assert (len(splits.train), len(splits.validation), len(splits.test)) == REAL[name]
    assert not check_data(project).errors


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
