"""What is installed: pinned dependencies, generated code, wheel and sdist."""

import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("cluster", "training", "serving", "federation")
EXTRAS = ("data", "s3", "flower", "train", "tfdv", "cluster", "dev")

# torch's wheel for NVIDIA machines names the CUDA libraries that it was built with, exactly.
NAMED_BY_TORCH = ("nvidia-", "cuda-", "triton")


def project() -> dict:
    """Read the project's table of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """Read constraints.txt: canonical name -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def needed() -> dict[str, str]:
    """Walk what Minga with all extras needs, as it is installed here: name -> version."""
    table = project()
    waiting = [*table["dependencies"]]
    waiting += [line for extra in EXTRAS for line in table["optional-dependencies"][extra]]
    versions: dict[str, str] = {}
    seen = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name == "minga" or name.startswith(NAMED_BY_TORCH) or str(requirement) in seen:
            continue
        seen.add(str(requirement))
        found = distribution(name)
        versions[name] = found.version.partition("+")[0]
        waiting += _active(found.requires or [], requirement.extras)
    return versions


def _active(lines: list[str], extras: set[str]) -> Iterator[str]:
    """Give the requirements that hold on this machine with these extras."""
    for line in lines:
        marker = Requirement(line).marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield line.partition(";")[0]


def files_of_parts() -> Iterator[Path]:
    """Give all files of all parts, from the repository's root on."""
    for root in SOURCE_ROOTS:
        for file in (ROOT / root / "minga").rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                yield file.relative_to(ROOT)


def test_constraints_pin_exactly_what_is_needed() -> None:
    """Every package that an installation with all extras brings is pinned, and no other."""
    assert pins() == needed()


def test_constraints_hold_versions_alone() -> None:
    """No URL, no local version, no marker: any index may serve what is pinned."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not [
        line
        for line in lines
        if not line.startswith("#") and not re.fullmatch(r"[\w.-]+==[\w.!]+", line)
    ]


def test_every_part_is_typed() -> None:
    """Each part says to type checkers that it has types."""
    files = set(files_of_parts())
    parts = {Path(*file.parts[:3]) for file in files}
    assert {part / "py.typed" for part in parts} <= files


def test_generated_code_is_that_of_the_protos(tmp_path: Path) -> None:
    """`make protos` reproduces the committed code byte for byte."""
    environment = Path(sys.prefix)
    # The environment is the one that runs this test, and counts as installed.
    words = ["-o", f"{environment}/.installed", f"VENV={environment}", f"OUT={tmp_path}"]
    subprocess.run(["make", *words, "protos"], cwd=ROOT, check=True, capture_output=True)
    generated = {
        file.relative_to(tmp_path): file.read_bytes()
        for file in tmp_path.rglob("*")
        if file.is_file()
    }
    roots = {"federation": "federation", "inference": "serving"}
    committed = {name: (ROOT / roots[name.parts[1]] / name).read_bytes() for name in generated}
    assert len(generated) == 6
    assert generated == committed


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build sdist and, from it, the wheel; give their folder."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    return folder


def test_the_wheel_holds_every_part(built: Path) -> None:
    """All modules, types, generated code and templates are in the wheel, and nothing else."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {str(Path(*file.parts[1:])) for file in files_of_parts()}


def test_the_sdist_can_be_worked_with(built: Path) -> None:
    """Sources, protos, tests and documentation are in the sdist."""
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert names >= {str(file) for file in files_of_parts()}
    assert names >= {
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "constraints.txt",
        "docs/index.md",
        "protos/minga/federation/v1/federation.proto",
        "pyproject.toml",
        "tests/test_packaging.py",
    }


def test_the_wheel_works_where_it_is_installed(built: Path, tmp_path: Path) -> None:
    """From the wheel alone, `minga` says its version and writes a project."""
    folder = tmp_path / "environment"
    venv.create(folder)
    python = folder / "bin" / "python"
    wheel = next(built.glob("*.whl"))
    words = ["--python", python, "install", "--quiet", "--no-index", "--no-deps", wheel]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    # Dependencies come from here. What a .pth file names is searched, but its own .pth files are
    # not followed: the checkout, which is installed here by one, stays out.
    packages = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    others = Path(pytest.__file__).parents[1]
    (packages / "dependencies.pth").write_text(f"{others}\n")
    where = [python, "-c", "import minga.cluster.project as p; print(p.__file__)"]
    assert str(packages) in subprocess.check_output(where, text=True, cwd=tmp_path)

    command = folder / "bin" / "minga"
    version = subprocess.check_output([command, "--version"], text=True, cwd=tmp_path)
    assert version.strip() == project()["version"]
    assert "coordinator" in subprocess.check_output([command, "--help"], text=True, cwd=tmp_path)
    subprocess.run([command, "init", "plant"], check=True, cwd=tmp_path)
    assert (tmp_path / "plant" / "minga.toml").is_file()
    assert (tmp_path / "plant" / "data" / "central.csv").is_file()
