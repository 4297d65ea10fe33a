"""The documentation: what it names exists, what it shows works, what is generated is current."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cyclopts import CycloptsError

from minga.cli.app import COMMANDS, app
from minga.federation.config import FederationConfig
from minga.federation.device.trainer_process import TrainerProcess

ROOT = Path(__file__).parents[1]
TEMPLATE = ROOT / "cluster" / "minga" / "cluster" / "template" / "README.md"
PAGES = (
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    TEMPLATE,
)
MAX_README_LINES = 150
MAX_CONTRIBUTING_LINES = 100


def name_of(page: Path) -> str:
    """Name a page from the repository's root on."""
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Give the fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


def shell_lines(page: Path) -> Iterator[str]:
    """Give what a page tells people to type, one command line each."""
    for block in blocks(page, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("    minga "):
            yield line


def invocations(line: str) -> Iterator[list[str]]:
    """Find the calls of `minga` in a command line: in pipes, lists, loops and substitutions."""
    for inner in re.findall(r"\$\(([^)]*)\)", line):
        yield from invocations(inner)
    lexer = shlex.shlex(re.sub(r"\$\([^)]*\)", "TEXT", line), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for token in [*_tokens(lexer), ";"]:
        if set(token) <= set("();<>|&"):
            if words[:1] in (["do"], ["then"]):
                words = words[1:]
            if words[:1] == ["minga"]:
                yield words[1:]
            words = []
        else:
            words.append(token)


def _tokens(lexer: shlex.shlex) -> list[str]:
    try:
        return list(lexer)
    except ValueError:  # a quotation that spans lines, such as a request's body: no call of ours
        return []


COMMAND_LINES = sorted(
    {
        (name_of(page), shlex.join(words))
        for page in PAGES
        for line in shell_lines(page)
        for words in invocations(line)
    }
)


@pytest.mark.parametrize(("page", "words"), COMMAND_LINES)
def test_command_lines_are_understood(page: str, words: str) -> None:
    """Every command line in the documentation, with all its options, is one that Minga takes."""
    try:
        app.parse_args(shlex.split(words), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        pytest.fail(f"{page}: minga {words}: {error}")


def test_commands_in_the_text_exist() -> None:
    """What is called `minga something` in running text is in the command tree."""
    unknown = []
    for page in PAGES:
        for command in re.findall(r"`minga ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
            first, *rest = command.split()
            nested = [word for word in rest[:1] if re.fullmatch(r"[a-z|]+", word)]
            names = nested[0].split("|") if nested and not _takes_words(first) else []
            for part in first.split("|"):
                if part not in COMMANDS or any(name not in app[part] for name in names):
                    unknown.append((name_of(page), command))
    assert not unknown


def _takes_words(command: str) -> bool:
    """Tell whether a command is one itself, and no group."""
    return command in COMMANDS and app[command].default_command is not None


def test_make_targets_exist() -> None:
    """What people are told to make can be made, and `make help` lists every target."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)[1].split())
    named = {
        target
        for page in PAGES
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.M)
    }
    listed = subprocess.check_output(["make", "-s", "help"], cwd=ROOT, text=True)
    assert named <= targets
    assert {line.split()[0] for line in listed.splitlines()} == targets


def test_generated_pages_are_current(tmp_path: Path) -> None:
    """The reference says what the code says; if not: `make docs`."""
    subprocess.run([sys.executable, "-m", "minga.cli.reference", tmp_path], check=True)
    written = {page.name: page.read_text() for page in tmp_path.iterdir()}
    committed = {name: (ROOT / "docs" / "reference" / name).read_text() for name in written}
    assert len(written) == 4
    assert committed == written


def test_links_lead_somewhere() -> None:
    """Every relative link of every page names a file."""
    broken = [
        (name_of(page), target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not broken


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Zensical finds every page, link and anchor."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    zensical = Path(sys.executable).with_name("zensical")
    done = subprocess.run(
        [zensical, "build", "--strict"], check=False, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    built = {page.relative_to(tmp_path / "site") for page in (tmp_path / "site").rglob("*.html")}
    pages = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    assert {page.with_suffix(".html") for page in pages} <= built


def test_every_page_is_in_the_navigation() -> None:
    """A page that nobody can find might as well not be there."""
    config = (ROOT / "zensical.toml").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r'"([\w/-]+\.md)"', config))


@pytest.mark.parametrize(
    ("page", "folder"),
    [
        ("reference/requirements.md", "."),
        ("reference/faults.md", "."),
        ("explanation/threat-model.md", "tests/federation"),
    ],
)
def test_tests_that_are_named_exist(page: str, folder: str) -> None:
    """Each claim points at a test function; each row of a table makes one."""
    text = (ROOT / "docs" / page).read_text()
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", text)
    assert named
    missing = [
        (file, test)
        for file, test in named
        if not (ROOT / folder / file).exists()
        or f"def {test}(" not in (ROOT / folder / file).read_text()
    ]
    assert not missing


@pytest.mark.parametrize("page", ["explanation/threat-model.md", "reference/faults.md"])
def test_every_row_is_shown(page: str) -> None:
    """What an attacker cannot do, and what follows a fault, is shown by a test, row by row."""
    text = (ROOT / "docs" / page).read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    titles = ("| it cannot", "| they cannot", "| who", "| fault")
    claims = [row for row in rows if not row.startswith(titles)]
    assert len(claims) > 20
    assert not [row for row in claims if "::test_" not in row]


def test_decisions_have_their_parts() -> None:
    """A decision says context, options, decision and consequences, under a number of its own."""
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert len({page.name[:4] for page in pages}) == len(pages)
    for page in pages:
        parts = re.findall(r"^## (.+)$", page.read_text(), flags=re.M)
        assert parts == ["Context", "Options", "Decision", "Consequences"], page.name


def test_front_pages_are_short() -> None:
    """README within 150 lines, CONTRIBUTING within 100."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= MAX_README_LINES
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= MAX_CONTRIBUTING_LINES


def test_settings_that_are_shown_are_valid() -> None:
    """TOML in the documentation is what `minga.toml` takes."""
    shown = [tomllib.loads(block) for page in PAGES for block in blocks(page, "toml")]
    tables = [table["federation"] for table in shown if "federation" in table]
    assert tables
    for table in tables:
        FederationConfig.model_validate(table)


def test_code_that_is_shown_compiles() -> None:
    """Python in the documentation is Python."""
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, name_of(page), "exec")


async def test_the_trainer_that_is_shown_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The how-to's trainer without a Task runs in a device's training process."""
    page = ROOT / "docs" / "how-to" / "run-a-federation.md"
    source = next(block for block in blocks(page, "python") if "sites.py" in block)
    (tmp_path / "sites.py").write_text(source)
    (tmp_path / "readings.csv").write_text("1,2\n3,4\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    trainer = TrainerProcess("sites:make", {"file": str(tmp_path / "readings.csv")})
    try:
        update = await trainer.fit({"mean": np.zeros(2, np.float32)}, {})
    finally:
        await trainer.close()
    assert update.delta["mean"].tolist() == [1.0, 1.5]
    assert update.num_examples == 2
