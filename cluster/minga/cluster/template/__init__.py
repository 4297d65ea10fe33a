"""The example project that `minga init` writes."""

import shutil
from importlib.resources import as_file, files
from pathlib import Path

from minga.cluster import shuttle
from minga.cluster.errors import ProjectError

SEED = 7

FILES = {
    "minga.toml": "minga.toml",
    "task.py": "task.py",
    "README.md": "README.md",
    "gitignore": ".gitignore",
}
"""File of this package -> its name in the project."""


def write(directory: Path, *, seed: int = SEED, num_sites: int = 0) -> tuple[Path, ...]:
    """Write the example project: settings, Task, README, and data.

    Args:
        directory: is made if it is missing.
        seed: of the data's shuffle; see `minga.cluster.shuttle.write`.
        num_sites: how many sites' data to write for a federation.

    Returns:
        the files written.

    Raises:
        ProjectError: the folder is not empty, or the data is not installed.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ProjectError(
            f"{directory} is there already and not empty; name another folder, or empty this one"
        )
    data = shuttle.write(directory / "data", seed=seed, num_sites=num_sites)
    written = []
    for name, target in FILES.items():
        with as_file(files(__name__) / name) as source:
            shutil.copyfile(source, directory / target)
        written.append(directory / target)
    return (*written, *data)
