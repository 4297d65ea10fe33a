"""Which rules hold against a fifth of liars on a real learning problem, and which do not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LARGE_LIES = ("flipped", "scaled")
HOLD = ("median", "trimmed mean", "multi-Krum", "geometric median")


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str, str], float]:
    """Run the benchmark roughly: (group size, rule, attack) -> accuracy."""
    report = tmp_path_factory.mktemp("poisoning") / "report.json"
    command = [sys.executable, ROOT / "benchmarks" / "poisoning.py", "--quick", "--json", report]
    subprocess.run(command, check=True, capture_output=True, text=True)
    written = json.loads(report.read_text())
    assert {"cpu", "cores", "load_average", "versions"} <= written["conditions"].keys()
    assert len(written["targets"]) == 1 + len(HOLD)
    return {
        (case["group_size"], case["rule"], case["attack"]): case["accuracy"]
        for case in written["cases"]
    }


@pytest.mark.slow
def test_liars_destroy_the_mean(accuracies: dict[tuple[int, str, str], float]) -> None:
    """Scaled updates bring the mean near guessing; without liars it learns."""
    assert accuracies[1, "mean", "nobody"] > 0.88
    assert accuracies[1, "mean", "scaled"] < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("attack", LARGE_LIES)
@pytest.mark.parametrize("rule", HOLD)
def test_robust_rules_hold(
    accuracies: dict[tuple[int, str, str], float], rule: str, attack: str
) -> None:
    """Robust rules lose little against flipped and scaled updates of a fifth of the devices."""
    assert accuracies[1, rule, attack] > accuracies[1, "mean", "nobody"] - 0.15


@pytest.mark.slow
def test_krum_holds_but_learns_less(accuracies: dict[tuple[int, str, str], float]) -> None:
    """One update in place of a mean costs accuracy where data are unlike, with liars or without."""
    honest = accuracies[1, "Krum", "nobody"]
    assert honest < accuracies[1, "mean", "nobody"] - 0.02
    assert accuracies[1, "Krum", "scaled"] > honest - 0.12


@pytest.mark.slow
def test_clipping_bounds_what_scaling_wins(
    accuracies: dict[tuple[int, str, str], float],
) -> None:
    """Clipped, a scaled lie does no more than an unscaled one; most of the mean survives."""
    clipped = accuracies[1, "mean, clipped", "scaled"]
    assert clipped == pytest.approx(accuracies[1, "mean, clipped", "flipped"], abs=0.06)
    assert clipped > 0.75


@pytest.mark.slow
def test_secrecy_in_groups_costs_robustness(
    accuracies: dict[tuple[int, str, str], float],
) -> None:
    """Groups of two still hold; in groups of four a fifth of liars spoils most sums."""
    assert accuracies[2, "median", "scaled"] > accuracies[2, "mean", "scaled"] + 0.3
    assert accuracies[4, "median", "scaled"] < 0.5
    assert accuracies[4, "geometric median", "scaled"] < 0.5
