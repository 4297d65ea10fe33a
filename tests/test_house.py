"""The rules of the house: what may import what, where things lie, how long they may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE_ROOTS = ("cluster", "training", "serving", "federation")
GENERATED = "_pb2"

LIGHT = (
    "minga.federation.device.agent",
    "minga.federation.device.server",
    "minga.federation.device.trainer_host",
    "minga.inference",
    "minga.inference.server",
    "minga.cli.device",
)
"""What runs on a device."""

HEAVY = {"torch", "ray", "mlflow", "pandas", "sklearn", "flwr"}
"""What no device that only runs models should have to load."""

MAX_FUNCTION_LINES = 80
USUAL_FUNCTION_LINES = 30
USUAL_SHARE = 0.9
MAX_FILE_LINES = 500

# Put together here, so that this file does not break its own rule.
FOREIGN = tuple(
    "".join(parts)
    for parts in (
        ("pypi", ".org"),
        ("python", "hosted.org"),
        ("registry", ".npmjs"),
        ("/wor", "k/"),
        ("/tm", "p/"),
        ("/roo", "t/"),
        ("/hom", "e/"),
    )
)
"""Package registries' hosts, and folders of one machine."""

TEXTS = {".py", ".pyi", ".md", ".toml", ".txt", ".proto", ".yaml", ".yml", ".json", ".sh", ""}


def python_files(*folders: str) -> Iterator[Path]:
    """Give what people wrote: no generated code."""
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if GENERATED not in file.name:
                yield file


def name_of(file: Path) -> str:
    """Name a file from the repository's root on."""
    return str(file.relative_to(ROOT))


@cache
def parse(file: Path) -> ast.Module:
    """Give a file's syntax tree."""
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Give all functions of a file, nested ones too."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count a function's lines without its docstring, which may be as long as it needs."""
    first = function.body[0]
    is_documented = ast.get_docstring(function) is not None
    documentation = first.end_lineno - first.lineno + 1 if is_documented else 0
    return function.end_lineno - function.lineno + 1 - documentation


def own_files() -> Iterator[Path]:
    """Give the repository's text files as far as they are ours."""
    hidden = {".ci", ".gitignore"}
    for top in sorted(ROOT.iterdir()):
        if top.name in ("dist", "site", "build") or (
            top.name.startswith(".") and top.name not in hidden
        ):
            continue
        for file in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if file.is_file() and file.suffix in TEXTS and "__pycache__" not in file.parts:
                yield file


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_no_init_hides_the_other_roots(root: str) -> None:
    """A `minga/__init__.py` would make one source root the whole package."""
    assert (ROOT / root / "minga").is_dir()
    assert not (ROOT / root / "minga" / "__init__.py").exists()


def packages_loaded_by(*modules: str) -> set[str]:
    """Import modules in a fresh process and name the packages that came with them."""
    code = f"import sys, {', '.join(modules)}; print(*{{n.partition('.')[0] for n in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_a_device_loads_nothing_heavy() -> None:
    """A device starts without torch, Ray, MLflow, pandas, scikit-learn and Flower."""
    assert not HEAVY & packages_loaded_by(*LIGHT)


def test_a_coordinator_loads_flower_only_for_a_strategy() -> None:
    """A coordinator starts as light as a device, and can refuse a strategy by its name alone."""
    loaded = packages_loaded_by(
        "minga.federation.coordinator.server", "minga.federation.flower.strategy"
    )
    assert not HEAVY & loaded


def test_ray_is_not_loaded_before_its_settings_are_made() -> None:
    """Ray reads its environment when it is imported: what runs before `local_ray` does not."""
    assert "ray" not in packages_loaded_by("minga.cluster.pipeline", "minga.cli.serve")


def test_dependencies_point_down() -> None:
    """The layers and the bans in pyproject.toml hold."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [linter, "--no-cache"], check=False, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_files_and_functions_are_short() -> None:
    """A file has at most 500 lines, a function 80 beside its docstring."""
    files = tuple(python_files(*SOURCE_ROOTS, "tests", "benchmarks"))
    lines = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert not {name: count for name, count in lines.items() if count > MAX_FILE_LINES}
    assert not [
        (name_of(file), function.name)
        for file in files
        for function in functions(file)
        if length(function) > MAX_FUNCTION_LINES
    ]


def test_most_functions_fit_a_glance() -> None:
    """Nine functions of ten have at most 30 lines."""
    lengths = [length(f) for file in python_files(*SOURCE_ROOTS) for f in functions(file)]
    assert sum(n <= USUAL_FUNCTION_LINES for n in lengths) >= USUAL_SHARE * len(lengths)


def test_every_test_says_what_holds() -> None:
    """Each test's docstring states the behaviour."""
    assert not [
        (name_of(file), function.name)
        for file in python_files("tests")
        for function in functions(file)
        if function.name.startswith("test_") and ast.get_docstring(function) is None
    ]


def test_no_file_knows_a_machine_or_a_registry() -> None:
    """Absolute paths and hosts of package registries have no place in here."""
    found = [
        (name_of(file), text)
        for file in own_files()
        for text in FOREIGN
        if text in file.read_text(encoding="utf-8", errors="replace")
    ]
    assert not found
