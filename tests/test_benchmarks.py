"""The benchmarks run, and what they write can be read."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGET = re.compile(r"TARGET (\S+) value=(\S+) goal=(>=|<=)(\S+) (met|missed)")


MAX_ERROR = 5e-4
"""Of a mean: a level is 3e-5, of which the largest of 100,000 errors is some."""


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
        assert ours["max_error"] < MAX_ERROR
        assert all(ours[name] > 0 for name in ("device_s", "finish_s", "sum_s", "unmask_s"))
        assert ours["server_peak_bytes"] > 0
    lines = [TARGET.fullmatch(line) for line in done.stdout.splitlines() if "TARGET" in line]
    assert all(lines)
    assert [line[1] for line in lines] == [one["name"] for one in written["targets"]]
    assert [line[5] == "met" for line in lines] == [one["met"] for one in written["targets"]]


@pytest.mark.slow
def test_rounds_are_measured(tmp_path: Path) -> None:
    """Real processes take part in plain and secure rounds, and the models are right."""
    report = tmp_path / "rounds.json"
    command = [sys.executable, ROOT / "benchmarks" / "rounds.py"]
    subprocess.run(
        [*command, "--quick", "--ours-only", "--json", report], check=True, capture_output=True
    )
    (case,) = json.loads(report.read_text())["cases"]
    assert case["runs"].keys() == {"plain", "secure", "limit"}
    assert all(run["max_error"] < MAX_ERROR for runs in case["runs"].values() for run in runs)
    assert 0 < case["median_round_s"]["limit"] < case["median_round_s"]["plain"]


SMALL_FLEET = """
import idle_fleet
idle_fleet.QUICK = idle_fleet.Scale(
    num_devices=40, num_processes=2, idle_s=2, cohort=20, num_rounds=1
)
idle_fleet.main()
"""


@pytest.mark.slow
def test_idle_fleet_is_measured(tmp_path: Path) -> None:
    """Devices of the benchmark connect, stay, and take part in a round."""
    report = tmp_path / "idle.json"
    subprocess.run(
        [sys.executable, "-c", SMALL_FLEET, "--quick", "--json", report],
        check=True,
        cwd=ROOT / "benchmarks",
        capture_output=True,
    )
    figures = json.loads(report.read_text())["figures"]
    assert figures["num_lost"] == 0
    assert figures["bytes_per_device"] > 0
    assert len(figures["start_s"]) == 1


SMALL_SUMS = """
import unmasking
unmasking.QUICK = (unmasking.Case(num_values=10_000, num_masks=4),)
unmasking.main()
"""


@pytest.mark.slow
def test_unmasking_is_measured(tmp_path: Path) -> None:
    """Threads and Ray's actors give the same bits, and a time for each run."""
    report = tmp_path / "unmasking.json"
    done = subprocess.run(
        [sys.executable, "-c", SMALL_SUMS, "--quick", "--json", report],
        check=True,
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    (case,) = json.loads(report.read_text())["cases"]
    assert case["case"] == {"num_values": 10_000, "num_masks": 4}
    assert len(case["threads_s"]) == len(case["ray_s"]) == 5
    assert min(*case["threads_s"], *case["ray_s"]) > 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TARGET")]
    assert TARGET.fullmatch(line)


@pytest.mark.slow
def test_secure_updates_cost_bytes_but_no_accuracy(tmp_path: Path) -> None:
    """Packed updates, rotated or not, learn as well as float32 over five seeds, in fewer bytes.

    As well: seed by seed, what rounding adds and takes is on average less than float32's own
    standard deviation over the seeds. Both learn from the same draws, so the seeds' luck is not in
    the difference; the deviation of five seeds is itself uncertain, so it counts as a hundredth at
    the least. Sparse updates, which do cost accuracy, fail the same test.
    """
    report = tmp_path / "bandwidth.json"
    command = [sys.executable, ROOT / "benchmarks" / "bandwidth.py"]
    subprocess.run([*command, "--quick", "--json", report], check=True, capture_output=True)
    written = json.loads(report.read_text())
    codecs = {one["codec"]: one["runs"] for one in written["codecs"]}
    accuracies = {name: [run["accuracy"] for run in runs] for name, runs in codecs.items()}
    exact = accuracies.pop("float32")
    assert len(exact) == 5
    assert statistics.fmean(exact) > 0.9
    secure = {name: some for name, some in accuracies.items() if name.startswith("packed")}
    assert {"packed", "packed, rotated (default)"} <= secure.keys()
    noise = max(statistics.stdev(exact), 0.01)

    def loss(some: list[float]) -> float:
        return statistics.fmean(a - b for a, b in zip(exact, some, strict=True))

    for name, some in secure.items():
        assert abs(loss(some)) < noise, name
    sizes = {name: runs[0]["upload_bytes"] for name, runs in codecs.items()}
    assert all(sizes[name] < sizes["float32"] for name in secure)
    assert loss(accuracies["top 1 %"]) > noise  # what costs accuracy shows
    judged = {target["name"]: target["met"] for target in written["targets"]}
    del judged["bandwidth.default_accuracy_loss_in_seed_deviations"]  # five seeds: judged above
    assert judged
    assert all(judged.values())


@pytest.mark.slow
def test_a_benchmark_without_its_data_says_so(tmp_path: Path) -> None:
    """Where the writers' digits are not there, the benchmark is skipped with a remedy."""
    command = [sys.executable, ROOT / "benchmarks" / "bandwidth.py", "--data", tmp_path]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("skipped: ")
    assert "--quick" in done.stdout


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


BRIEF_BATCHING = """
import batching
batching.QUICK = batching.Scale(widths=(64, 512, 512, 10), seconds=0.1)
batching.main()
"""


@pytest.mark.slow
def test_batching_is_measured(tmp_path: Path) -> None:
    """Callers are answered with and without batches, and a crowd is served faster with them."""
    report = tmp_path / "batching.json"
    subprocess.run(
        [sys.executable, "-c", BRIEF_BATCHING, "--quick", "--json", report],
        check=True,
        cwd=ROOT / "benchmarks",
        capture_output=True,
    )
    written = json.loads(report.read_text())
    assert [case["callers"] for case in written["cases"]] == [1, 16, 64]
    assert all(case["limit_rows_per_s"] > 0 for case in written["cases"])
    rates = {name: median["rows_per_s"] for name, median in written["cases"][-1]["medians"].items()}
    assert rates["batched"] > rates["single"]


BRIEF_MONITOR = """
import monitor
if __name__ == "__main__":
    monitor.QUICK = monitor.Scale(seconds=0.4, num_pairs=1)
    monitor.main()
"""


@pytest.mark.slow
def test_the_cost_of_watching_is_measured(tmp_path: Path) -> None:
    """A server is asked with and without its monitor, and every row of the former is counted."""
    report = tmp_path / "monitor.json"
    done = subprocess.run(
        [sys.executable, "-c", BRIEF_MONITOR, "--quick", "--json", report],
        check=True,
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    written = json.loads(report.read_text())
    (pair,) = written["turns"]
    assert min(turn["answers_per_s"] for turn in pair.values()) > 0
    assert 0 < written["monitor_us"] < pair["with"]["processor_us"]
    lines = [TARGET.fullmatch(line) for line in done.stdout.splitlines() if "TARGET" in line]
    assert [line[1] for line in lines] == [
        f"monitor.{name}_share" for name in ("thread", "processor", "throughput")
    ]


SMALL_SIMULATION = """
import simulation
simulation.QUICK = simulation.Scale(cases=("drawn",), repeats=1, num_rounds=4, on_ray=False)
simulation.main()
"""


@pytest.mark.slow
def test_simulations_are_measured(tmp_path: Path) -> None:
    """Ours and a loop by hand do the same work: they end with the same accuracy."""
    report = tmp_path / "simulation.json"
    done = subprocess.run(
        [sys.executable, "-c", SMALL_SIMULATION, "--quick", "--ours-only", "--json", report],
        check=True,
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    (case,) = json.loads(report.read_text())["cases"]
    ours, loop = case["medians"]["ours"], case["medians"]["loop"]
    assert ours["accuracy"] == pytest.approx(loop["accuracy"], abs=0.003)
    assert ours["pace"] > 0.5 * loop["pace"] > 0  # which so small a case says nothing more about
    lines = [TARGET.fullmatch(line) for line in done.stdout.splitlines() if "TARGET" in line]
    assert [line[1] for line in lines] == ["simulation_ratio_to_loop", "simulation_accuracy_spread"]


SMALL_OVERHEAD = """
import overhead
overhead.CASES = (overhead.Case(name="small", params={"hidden": 8}, epochs=3),)
overhead.NUM_TRIALS, overhead.TRIAL_EPOCHS = 2, 2
overhead.whole_path = lambda source, scratch: {}
overhead.main()
"""


@pytest.mark.slow
def test_overhead_is_measured(tmp_path: Path) -> None:
    """Every layer around the plain loop has a figure; the path as a whole has its own tests."""
    report = tmp_path / "overhead.json"
    subprocess.run(
        [sys.executable, "-c", SMALL_OVERHEAD, "--quick", "--json", report],
        check=True,
        cwd=ROOT / "benchmarks",
        capture_output=True,
    )
    written = json.loads(report.read_text())
    (case,) = written["cases"]
    assert all(value > 0 for name, value in case.items() if name != "case")
    assert [target["name"] for target in written["targets"]] == ["overhead.train_epoch[small]"]


@pytest.mark.slow
def test_drift_is_measured(tmp_path: Path) -> None:
    """The quick study has its sizes, no false alarm too many, and the delay that is claimed."""
    report = tmp_path / "drift.json"
    command = [sys.executable, ROOT / "benchmarks" / "drift.py"]
    subprocess.run(
        [*command, "--quick", "--ours-only", "--json", report], check=True, capture_output=True
    )
    written = json.loads(report.read_text())
    assert [case["size"] for case in written["cases"]] == [50, 500, 5000]
    assert all(target["met"] for target in written["targets"])


FEW_SERVERS = """
import serving
serving.OWN = tuple(one for one in serving.OWN if one.name != "minga on Ray")
serving.main()
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("wrk") and shutil.which("h2load")),
    reason="wrk and h2load (nghttp2-client) are not installed",
)
def test_serving_is_measured(tmp_path: Path) -> None:
    """Our server and the bare ones answer right on every wire, with a rate, times and a cost.

    The benchmark itself fails if our server's monitor has not seen what was asked.
    """
    report = tmp_path / "serving.json"
    done = subprocess.run(
        [sys.executable, "-c", FEW_SERVERS, "--quick", "--ours-only", "--json", report],
        check=True,
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
    )
    (case,) = json.loads(report.read_text())["cases"]
    measured = {(row["server"], row["wire"]) for row in case["runs"]}
    assert {("minga", wire) for wire in ("json", "binary", "grpc")} <= measured
    assert {("bare starlette", "json"), ("bare grpc.aio", "grpc")} <= measured
    for row in case["runs"]:
        assert 0 < row["median"]["p50_ms"] <= row["median"]["p99_ms"]
        assert min(row["median"].values()) > 0
    assert "TARGET serving.local_http_to_bare" in done.stdout
