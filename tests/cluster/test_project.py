"""Reading minga.toml, and the example project."""

import filecmp
import tomllib

import numpy as np
import pytest

from minga.cluster import shuttle, template
from minga.cluster.errors import ProjectError
from minga.cluster.project import Project, load
from minga.training.data import check, profile_of
from minga.training.federated import trainer_from_options

SOUND = 'task = "task.py:T"\n[data]\nsource = "data/a.csv"\n'


@pytest.fixture
def read(tmp_path):
    """Reads a minga.toml of the given text."""

    def write_and_load(text):
        (tmp_path / "minga.toml").write_text(text)
        return load(tmp_path)

    return write_and_load


def test_defaults_are_enough(read, tmp_path):
    """A Task and a source are all that a project must say; everything lies in the project."""
    project = read(SOUND)
    assert project.search.num_trials == 8
    assert project.source == str(tmp_path / "data/a.csv")
    assert project.tracking_uri == f"sqlite:///{tmp_path}/.minga/mlflow.db"
    assert not project.has_registry


def test_environment_moves_what_is_kept(read, monkeypatch, tmp_path):
    """The registry, its files and unfinished work may lie elsewhere, by process settings."""
    monkeypatch.setenv("MINGA_TRACKING_URI", "http://tracking:5000")
    monkeypatch.setenv("MINGA_ARTIFACT_ROOT", "s3://bucket/minga")
    monkeypatch.setenv("MINGA_RAY_STORAGE", str(tmp_path / "shared"))
    project = read(SOUND)
    assert project.tracking_uri == "http://tracking:5000"
    assert project.artifact_root == "s3://bucket/minga"
    assert project.ray_storage == tmp_path / "shared"
    assert project.has_registry


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SOUND + "[search]\nnum_trails = 3\n", "unknown key search.num_trails; did you mean num"),
        (SOUND + "[training]\nepochs = 'ten'\n", "training.epochs should be a valid int.*'ten'"),
        (SOUND + "[gates]\nmax_size_mb = -1\n", "gates.max_size_mb should be greater than 0.*-1"),
        ("[data]\nsource = 'a'\n", "task is missing; add it"),
        ("task = 'T'\n[data]\nsource = 'a'\n", "task String should match.*not 'T'"),
        ("task = ", "is no TOML"),
    ],
    ids=["unknown key", "wrong type", "out of range", "missing", "no reference", "no TOML"],
)
def test_mistake_is_explained(read, text, words):
    """Each mistake is one line: where, what was read, what to do."""
    with pytest.raises(ProjectError, match=words) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_all_mistakes_are_said_at_once(read):
    """Three mistakes in three tables are three parts of one message."""
    text = SOUND + "[search]\nnum_trials = 0\n[serving]\nport = 'x'\n[federation]\nrounds = 1\n"
    with pytest.raises(ProjectError, match=r"search.num_trials.*serving.port.*federation.rounds"):
        read(text)


def test_folder_without_a_project_is_explained(tmp_path):
    """Outside of a project the message says how to make one."""
    with pytest.raises(ProjectError, match=r"no minga.toml in .*minga init DIR"):
        load(tmp_path)


def test_example_project_is_whole(tmp_path):
    """What `minga init` writes loads, reads its data, and finds nothing wrong with it."""
    template.write(tmp_path / "plant")
    project = load(tmp_path / "plant")
    splits = project.splits
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (2400, 600, 10_000)
    task = project.loaded_task
    profile = profile_of(task, splits.train)
    assert check(splits, task.schema(splits.train), profile, project.data) == ()
    assert (tmp_path / "plant" / ".gitignore").read_text().startswith(".minga/")


def test_example_names_only_known_keys():
    """Every key of the example's settings is one that the project reads."""
    from importlib.resources import files

    text = (files(template) / "minga.toml").read_text()
    Project.model_validate(tomllib.loads(text))


def test_example_is_not_written_over_files(tmp_path):
    """A folder with anything in it is refused and left as it is."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ProjectError, match="not empty; name another folder"):
        template.write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


def test_sites_of_the_example_train_devices(tmp_path):
    """A site's data trains a device; all sites have the same test split."""
    template.write(tmp_path / "plant", num_sites=3)
    trainer = trainer_from_options(
        {"project": str(tmp_path / "plant"), "source": "data/site-2.csv"}
    )
    network = load(tmp_path / "plant")
    task = network.loaded_task
    assert len(task.data(str(tmp_path / "plant/data/site-1.csv")).test) == 10_000
    from minga.training.network import build_network, parameters_of

    start = parameters_of(build_network(task, task.defaults, network.splits.train, seed=1))
    assert trainer.fit(start, {"epochs": 1}).num_examples > 0


def test_readings_are_dealt_out_once(tmp_path):
    """Test, central and site files together are all readings, each in one file."""
    files = shuttle.write(tmp_path, seed=7, num_sites=8)
    tables = [np.loadtxt(file, delimiter=",", skiprows=1) for file in files]
    rows = np.concatenate(tables)
    assert len(rows) == len(np.unique(rows, axis=0)) == 49_097
    assert [file.name for file in files[:3]] == ["test.csv", "central.csv", "site-0.csv"]
    sizes = [len(table) for table in tables[2:]]
    mixes = [table[:, -1].mean() for table in tables[2:]]
    assert min(sizes) >= shuttle.MIN_ROWS
    assert max(sizes) > 5 * min(sizes)
    assert max(mixes) > 5 * min(mixes)


def test_same_seed_deals_the_same(tmp_path):
    """Files repeat; test and central sets do not depend on the number of sites."""
    shuttle.write(tmp_path / "a", seed=7, num_sites=4)
    shuttle.write(tmp_path / "b", seed=7, num_sites=4)
    shuttle.write(tmp_path / "c", seed=7)
    names = [file.name for file in (tmp_path / "a").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", names, shallow=False)[0] == names
    common = ["central.csv", "test.csv"]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", common, shallow=False)[0] == common


def test_too_many_sites_are_refused(tmp_path, monkeypatch):
    """More sites than readings allow end with a message, not with an endless draw."""
    monkeypatch.setattr(shuttle, "MAX_DRAWS", 3)
    with pytest.raises(ProjectError, match="cannot be dealt out to 3000 sites"):
        shuttle.write(tmp_path, seed=7, num_sites=3000)
