"""`minga audit`: what it shows, what it finds, and its exit codes."""

import asyncio
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from minga.cli.app import main
from minga.federation.coordinator.server import Coordinator
from minga.federation.coordinator.settings import CoordinatorSettings
from minga.federation.operator import connect

BROKEN = 36


async def _work(state: Path) -> None:
    """Run a coordinator and make two tokens."""
    settings = CoordinatorSettings(state=state, port=0, enrol_port=0, metrics_port=0)
    async with Coordinator(settings), connect(state) as operator:
        for group in ("line-3", "line-4"):
            await operator.create_token(group, 600)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state folder of a coordinator that ran and stopped."""
    state = tmp_path_factory.mktemp("audit") / "state"
    asyncio.run(_work(state))
    return state


@pytest.fixture
def state(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "state")


def done(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """Run a command that succeeds; gives what it printed."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert not ended.value.code, captured.err
    return captured.out


def fails(capsys: pytest.CaptureFixture[str], code: int, *words: str | Path) -> str:
    """Run a command that fails with a code; gives what it said."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == code
    return capsys.readouterr().err


def export(capsys: pytest.CaptureFixture[str], state: Path, name: str = "audit.jsonl") -> Path:
    """Export the log."""
    file = state.parent / name
    done(capsys, "audit", "export", file, "--state", state)
    return file


def test_show(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table, or JSON; all, the newest, or those of a kind or a subject."""
    table = done(capsys, "audit", "show", "--state", state)
    assert "coordinator-started" in table
    assert "line-4" in table
    entries = json.loads(done(capsys, "audit", "show", "--state", state, "--json"))
    assert [entry["sequence"] for entry in entries] == [1, 2, 3, 4]
    words = ["audit", "show", "--state", state, "--json"]
    (newest,) = json.loads(done(capsys, *words, "--last", "1"))
    assert newest["kind"] == "coordinator-stopped"
    tokens = json.loads(done(capsys, *words, "--kind", "token-made"))
    assert [token["details"]["group"] for token in tokens] == ["line-3", "line-4"]
    (token,) = json.loads(done(capsys, *words, "--subject", tokens[0]["subject"]))
    assert token == tokens[0]
    assert "no entry" in done(capsys, "audit", "show", "--state", state, "--kind", "x")


def test_verify(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A whole log says how much of it is signed, and the hash to keep."""
    text = done(capsys, "audit", "verify", "--state", state)
    assert "entries   4" in text
    assert "1 to 4, by" in text
    report = json.loads(done(capsys, "audit", "verify", "--state", state, "--json"))
    assert (report["entries"], report["signed_until"]) == (4, 4)
    assert report["last_hash"] in text


def test_verify_elsewhere(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export and the authority's certificate are enough; with a foreign one it is refused."""
    file = export(capsys, state)
    authority = shutil.copy(state / "operator" / "ca.pem", state.parent / "ca.pem")
    shutil.rmtree(state)
    assert "entries   4" in done(capsys, "audit", "verify", file, "--authority", authority)
    other = state.parent / "other"
    asyncio.run(_work(other))
    message = fails(
        capsys, BROKEN, "audit", "verify", file, "--authority", other / "operator" / "ca.pem"
    )
    assert "not issued by this federation's authority" in message


def test_an_altered_database(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who made a token is changed in the file: the entry is named, the code is its own."""
    with sqlite3.connect(state / "coordinator.db") as connection:
        connection.execute("DROP TRIGGER audit_log_keeps_update")
        connection.execute(
            "UPDATE audit_log SET details = replace(details, 'line-3', 'line-9') WHERE sequence = 2"
        )
    connection.close()
    message = fails(capsys, BROKEN, "audit", "verify", "--state", state)
    assert "entry 2 was altered" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("kind", ["removed", "swapped", "altered"])
def test_an_altered_export(state: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    """One line less, two in another order, one letter."""
    file = export(capsys, state)
    lines = file.read_text().splitlines(keepends=True)
    match kind:
        case "removed":
            del lines[2]
        case "swapped":
            lines[2], lines[3] = lines[3], lines[2]
        case "altered":
            lines[2] = lines[2].replace("line-3", "line-9")
    file.write_text("".join(lines))
    message = fails(
        capsys, BROKEN, "audit", "verify", file, "--authority", state / "operator" / "ca.pem"
    )
    assert "broken" in message


def test_a_log_that_was_cut_back(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its checkpoints gone as well, only an export that was kept tells."""
    kept = export(capsys, state)
    with sqlite3.connect(state / "coordinator.db") as connection:
        for table in ("audit_log", "audit_checkpoints"):
            connection.execute(f"DROP TRIGGER {table}_keeps_delete")
        connection.execute("DELETE FROM audit_checkpoints WHERE sequence > 1")
        connection.execute("DELETE FROM audit_log WHERE sequence > 1")
    connection.close()
    assert "entries   1" in done(capsys, "audit", "verify", "--state", state)
    words = ["audit", "verify", "--state", state, "--kept", kept]
    assert "the copy has entry 2" in fails(capsys, BROKEN, *words)


def test_a_log_that_grew_extends_its_copy(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An export from before is a part of the log of now."""
    kept = export(capsys, state)
    asyncio.run(_work(state))
    done(capsys, "audit", "verify", "--state", state, "--kept", kept)


def test_an_export_replaces_nothing(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file may be the evidence."""
    file = export(capsys, state)
    before = file.read_bytes()
    assert "exists" in fails(capsys, 35, "audit", "export", file, "--state", state)
    assert file.read_bytes() == before
    assert "name another" in fails(
        capsys, 35, "audit", "export", state / "no" / "folder", "--state", state
    )


def test_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is no coordinator's says what to name."""
    assert "--state" in fails(capsys, 35, "audit", "show", "--state", tmp_path)
    export_file = tmp_path / "audit.jsonl"
    assert "--state" in fails(capsys, 35, "audit", "export", export_file, "--state", tmp_path)
    assert not export_file.exists()
