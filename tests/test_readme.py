"""The README's session, executed as it stands."""

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 12
PATIENCE_S = 900
MARK = "MINGA_TEST_SESSION"

# Stands for the person at the keyboard, who waits until a server says that it is ready, for ports
# that nothing else on this machine may have, and for a search of two trials instead of eight. All
# else goes to the command as it is.
KEYBOARD = """\
#!{python}
import os, pathlib, subprocess, sys, time, urllib.request

PORT = "{port}"

def wait_for(is_there):
    deadline = time.monotonic() + 120
    while not is_there():
        if time.monotonic() > deadline:
            sys.exit("a server of the session does not get ready")
        time.sleep(0.1)

def is_ready():
    try:
        return urllib.request.urlopen("http://127.0.0.1:" + PORT + "/v2/health/ready").status == 200
    except OSError:
        return False

words = sys.argv[1:]
minga = [{python!r}, "-m", "minga.cli"]
if words[0] == "init":
    subprocess.run(minga + words, check=True)
    settings = pathlib.Path(words[1], "minga.toml")
    text = settings.read_text().replace("port = 8000", "port = " + PORT)
    settings.write_text(text.replace("num_trials = 8", "num_trials = 2"))
    sys.exit()
if words[0] == "predict":
    wait_for(is_ready)
    words += ["--url", "http://127.0.0.1:" + PORT]
if words[:2] == ["coordinator", "run"]:
    words += ["--port", "0", "--enrol-port", "0", "--metrics-port", "0"]
if words[:2] == ["coordinator", "token"]:
    wait_for(pathlib.Path("coordinator/operator/coordinator.json").exists)
os.execv({python!r}, minga + words)
"""


def session() -> str:
    """Give the marked block of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^<!-- session.*-->\n```bash\n(.*?)^```$", text, flags=re.M | re.S)
    return block


def marked(mark: str) -> list[psutil.Process]:
    """Give the processes that were started by this test, or by one of those."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def is_soon(condition: Callable[[], bool], patience_s: float) -> bool:
    """Wait until a condition holds."""
    deadline = time.monotonic() + patience_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.2)
    return condition()


@pytest.fixture
def environment(tmp_path: Path, unused_tcp_port: int) -> Iterator[dict[str, str]]:
    """An environment whose processes are found again; none survives the test."""
    command = tmp_path / "bin" / "minga"
    command.parent.mkdir()
    command.write_text(KEYBOARD.format(python=sys.executable, port=unused_tcp_port))
    command.chmod(0o755)
    mark = uuid.uuid4().hex
    own = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    yield {**own, MARK: mark, "PATH": f"{command.parent}:{os.environ['PATH']}"}
    for process in marked(mark):
        process.kill()


def test_the_session_is_short() -> None:
    """Twelve lines show all of it."""
    assert len(session().splitlines()) <= MAX_LINES


@pytest.mark.slow
def test_the_session_does_what_it_says(tmp_path: Path, environment: dict[str, str]) -> None:
    """From an empty folder to a federated model that is served; then everything is gone."""
    output, log = tmp_path / "output", tmp_path / "log"
    with output.open("wb") as results, log.open("wb") as notes:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", session()],
            check=False,
            cwd=tmp_path,
            env=environment,
            stdout=results,
            stderr=notes,
            timeout=PATIENCE_S,
        )
    said = output.read_text()
    assert done.returncode == 0, log.read_text()[-3000:]
    assert "shuttle-anomaly version 1 is champion" in said
    assert re.search(r"^row +output", said, flags=re.M)
    assert "enrolled as site-7" in said
    assert "shuttle-anomaly version 2: promoted to champion" in said
    assert "8 of 8 devices connected" in said
    assert "5 of 5 rounds" in said
    assert is_soon(lambda: not marked(environment[MARK]), 60), marked(environment[MARK])
