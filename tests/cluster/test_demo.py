"""A small demo: every part of the loop, in real processes, on real data.

`tests/test_readme.py` has eight devices.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PATIENCE_S = 420
NUM_SITES = 5


def demo_command(folder: Path, report: Path) -> list[str]:
    words = ["demo", "--folder", str(folder), "--report", str(report)]
    words += ["--trials", "1", "--rounds", "4", "--sites", str(NUM_SITES)]
    return [sys.executable, "-m", "minga.cli", *words]


def is_all_gone(folder: Path) -> bool:
    """Wait for the end of what was told to end; a busy machine takes its time."""
    deadline = time.monotonic() + 30
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not processes_of(folder)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process whose command line names the folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """A folder; whatever still runs in it afterwards is ended."""
    yield tmp_path / "demo"
    for process in processes_of(tmp_path):
        process.kill()


@pytest.mark.slow
def test_demo_runs_the_whole_loop(work: Path, tmp_path: Path) -> None:
    """Searched, trained, served, federated, swapped without a failure, on every device."""
    report_file = tmp_path / "report.json"
    done = subprocess.run(
        demo_command(work, report_file),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(report_file.read_text())
    metrics = report["metrics"]
    assert report["promoted"], metrics
    assert (
        metrics["federated"]["average_precision"]
        >= metrics["site alone (mean)"]["average_precision"]
    )
    killed = report["killed"]
    assert killed["device"] not in killed["survivors"]
    assert killed["total_weight"] == killed["expected_weight"]
    assert report["traffic"]["num_failures"] == 0
    assert report["traffic"]["versions"] == ["1", "2"]
    assert [answer["version"] for answer in report["devices"]] == ["2"] * NUM_SITES
    assert len({answer["sha256"] for answer in report["devices"]}) == 1
    assert "site alone (mean)" in done.stdout
    assert processes_of(work) == []


@pytest.mark.slow
def test_interrupted_demo_leaves_nothing_running(work: Path, tmp_path: Path) -> None:
    """A demo that is told to stop while devices run ends them all and says where its files are."""
    log = tmp_path / "demo.log"
    with log.open("wb") as output:
        demo = subprocess.Popen(
            demo_command(work, tmp_path / "report.json"), stdout=output, stderr=output
        )
    deadline = time.monotonic() + PATIENCE_S
    while not (work / "devices" / "site-1" / "endpoints.json").exists():
        assert demo.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(demo.pid, signal.SIGTERM)
    demo.wait(timeout=60)
    assert demo.returncode != 0
    assert is_all_gone(work), processes_of(work)
    assert "did not finish" in log.read_text()


@pytest.mark.slow
def test_demo_wants_an_empty_folder(tmp_path: Path) -> None:
    """A folder with something in it is left alone; the message says what to do."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "thesis.txt").write_text("mine")
    done = subprocess.run(
        demo_command(tmp_path, tmp_path / "report.json"),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 10
    assert "not empty" in done.stderr
    assert (tmp_path / "project" / "thesis.txt").read_text() == "mine"
