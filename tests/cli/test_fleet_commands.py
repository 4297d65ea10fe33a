"""`minga coordinator` and `device`: what an operator types, sees, and gets as exit code."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minga.cluster.processes import LocalFleet
from minga.federation.operator import ADDRESS_FILE, OPERATOR_FOLDER

MINGA = [sys.executable, "-m", "minga.cli"]


def run(*words: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [*MINGA, *map(str, words)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def fails(code: int, *words: str | Path, stdin: str = "") -> str:
    """Run a command that must fail in one or two lines, with a code; gives what it said."""
    done = run(*words, stdin=stdin)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("minga: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """A coordinator process."""
    with LocalFleet(tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.start_coordinator(reconnect_grace_s=1.0)
        yield fleet


def new_token(fleet: LocalFleet) -> str:
    done = run("coordinator", "token", "--state", fleet.state)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_token_enrol_list_revoke(fleet: LocalFleet) -> None:
    """A token enrols a device from standard input; listings show it; revoking is seen."""
    folder = fleet.device_folder("press-1")
    done = run(
        "device", "enroll", "-", "--folder", folder, "--name", "press-1", stdin=new_token(fleet)
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
    listed = json.loads(run("device", "list", "--state", fleet.state, "--json").stdout)
    assert [(row["device"], row["state"]) for row in listed] == [("press-1", "away")]
    assert "press-1" in run("device", "list", "--state", fleet.state).stdout
    assert run("device", "revoke", "press-1", "--state", fleet.state).returncode == 0
    assert "revoked" in run("device", "list", "--state", fleet.state).stdout
    assert "revoked" in fails(31, "device", "run", "--folder", folder, "--port", "0")


@pytest.mark.slow
def test_bad_tokens(fleet: LocalFleet, tmp_path: Path) -> None:
    """A garbled, an unknown and a used token: each says what to do, with the code of enrolment."""
    token = new_token(fleet)
    assert run("device", "enroll", token, "--folder", tmp_path / "a", "--name", "a").returncode == 0
    assert "used already" in fails(
        30, "device", "enroll", token, "--folder", tmp_path / "b", "--name", "b"
    )
    message = fails(30, "device", "enroll", token[:-9], "--folder", tmp_path / "c", "--name", "c")
    assert "token" in message
    message = fails(30, "device", "enroll", "hello", "--folder", tmp_path / "d", "--name", "d")
    assert "token" in message
    message = fails(30, "device", "enroll", token, "--folder", tmp_path / "a", "--name", "a")
    assert "identity already" in message


@pytest.mark.slow
def test_foreign_certificate(fleet: LocalFleet, tmp_path: Path) -> None:
    """A device of another federation is told that the coordinator is not its own."""
    with LocalFleet(tmp_path) as other:
        other.start_coordinator(reconnect_grace_s=1.0)
        folder = tmp_path / "stranger"
        token = new_token(other)
        assert run("device", "enroll", token, "--folder", folder, "--name", "x").returncode == 0
    mine = fleet.device_folder("local")
    token = new_token(fleet)
    assert run("device", "enroll", token, "--folder", mine, "--name", "local").returncode == 0
    shutil.copy(mine / "coordinator.json", folder / "coordinator.json")
    assert "trust" in fails(31, "device", "run", "--folder", folder, "--port", "0")
    shutil.copy(mine / "ca.pem", folder / "ca.pem")
    assert "not issued" in fails(31, "device", "run", "--folder", folder, "--port", "0")


@pytest.mark.slow
def test_strangers_do_not_fill_the_log(fleet: LocalFleet) -> None:
    """Who speaks no TLS to a port is hung up on, without a line in the coordinator's log."""
    address = json.loads((fleet.state / OPERATOR_FOLDER / ADDRESS_FILE).read_text())["address"]
    host, port = address.rsplit(":", 1)
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=10) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                while stranger.recv(4096):  # until it hangs up
                    pass
    assert "handshake" not in fleet.child("coordinator").log.read_text().lower()


def test_port_in_use(fleet: LocalFleet, tmp_path: Path) -> None:
    """Coordinator and device name the port that is taken."""
    folder = fleet.device_folder("ported")
    token = new_token(fleet)
    assert run("device", "enroll", token, "--folder", folder, "--name", "ported").returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words = ["coordinator", "run", "--state", tmp_path / "state", "--port", port]
        assert port in fails(22, *words, "--enrol-port", "0", "--metrics-port", "0")
        assert port in fails(22, "device", "run", "--folder", folder, "--port", port)


@pytest.mark.slow
def test_coordinator_away(tmp_path: Path) -> None:
    """Without a coordinator, operators and new devices are told whom they cannot reach."""
    with LocalFleet(tmp_path) as fleet:
        coordinator = fleet.start_coordinator(reconnect_grace_s=1.0)
        token = new_token(fleet)
        coordinator.process.send_signal(signal.SIGTERM)
        assert coordinator.process.wait(timeout=20) == 0
    assert "127.0.0.1" in fails(32, "device", "list", "--state", fleet.state)
    assert "127.0.0.1" in fails(
        32, "device", "enroll", token, "--folder", tmp_path / "d", "--name", "d"
    )


@pytest.mark.slow
def test_missing_identity(tmp_path: Path) -> None:
    """A folder without an identity says which folder is wanted."""
    assert "operator" in fails(31, "device", "list", "--state", tmp_path)
    assert "enrol" in fails(31, "device", "run", "--folder", tmp_path, "--port", "0")
