"""What tests of the whole loop share."""

import contextlib
import io
import json
import shutil
from importlib.resources import files

import pytest

from minga.cluster import template
from minga.cluster.project import load

UNTOUCHED = "untouched"
"""A copy beside the finished project, in which no test has promoted anything."""

SMALL = {"num_trials = 8": "num_trials = 3", "max_epochs = 8": "max_epochs = 3"}
SMALL |= {"num_workers = 2": "num_workers = 1", "epochs = 10": "epochs = 6"}


@pytest.fixture(scope="session")
def finished(ray_cluster, with_database, tmp_path_factory):
    """A project after `minga run --json`, and what that printed."""
    from minga.cli.app import main

    directory = tmp_path_factory.mktemp("plant") / "plant"
    template.write(directory)
    text = (files(template) / "minga.toml").read_text()
    for old, new in SMALL.items():
        text = text.replace(old, new)
    (directory / "minga.toml").write_text(text)
    with_database(directory)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main(["run", "--project", str(directory), "--json"])
    shutil.copytree(directory, directory.with_name(UNTOUCHED))
    return load(directory), json.loads(printed.getvalue())
