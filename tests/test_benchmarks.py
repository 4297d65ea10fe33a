"""The benchmarks run, and what they write can be read."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGET = re.compile(r"TARGET (\S+) value=(\S+) goal=(>=|<=)(\S+) (met|missed)")


@pytest.mark.slow
def test_secure_aggregation_is_measured(tmp_path: Path) -> None:
    """The quick run gives right sums, figures for every case, and targets in the agreed form."""
    report = tmp_path / "secagg.json"
    command = [sys.executable, ROOT / "benchmarks" / "secagg.py"]
    done = subprocess.run(
        [*command, "--quick", "--ours-only", "--json", report],
        check=True,
        capture_output=True,
        text=True,
    )
    written = json.loads(report.read_text())
    assert {"cpu", "cores", "load_average", "versions"} <= written["conditions"].keys()
    rounds = [(one["case"]["num_devices"], one["case"]["num_lost"]) for one in written["cases"]]
    assert rounds == [(8, 0), (8, 2), (32, 0), (32, 6)]
    for one in written["cases"]:
        ours = one["medians"]["ours"]
        assert ours["max_error"] < 1e-4
        assert all(ours[name] > 0 for name in ("device_s", "finish_s", "sum_s", "unmask_s"))
        assert ours["server_peak_bytes"] > 0
    lines = [TARGET.fullmatch(line) for line in done.stdout.splitlines() if "TARGET" in line]
    assert all(lines)
    assert [line[1] for line in lines] == [one["name"] for one in written["targets"]]
    assert [line[5] == "met" for line in lines] == [one["met"] for one in written["targets"]]


@pytest.mark.slow
def test_a_rival_without_a_pin_is_refused() -> None:
    """What is compared is a version that constraints.txt names, not whichever is newest."""
    code = "import harness; harness.rival_python('no-such-rival')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    assert "RivalError: constraints.txt pins no no-such-rival" in done.stderr
