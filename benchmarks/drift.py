"""How often drift is alarmed of without a reason, and how soon with one, by the size of windows.

Ten normal columns against a reference of 1000 rows, in windows of 50 to 10,000 rows. A day is 100
windows; a day with any alarm of any column is a false alarm if nothing has moved, and a needless
one if a column has moved by a tenth of its deviation. The delay is to the first alarm after one
column has moved by more. Beside Minga's judgement stand the usual fixed thresholds: PSI > 0.2, KS
p < 0.05, Wasserstein > 0.1 deviations, each on a single window.

Every window of ours is judged by the code that serves. Those in which no statistic of any column
is large cannot count, and are not judged, which is what makes the study fast. Windows are drawn as
counts of the reference's bins, from the bins' true probabilities; the rivals' windows, and ours of
the same days, are drawn value by value.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from harness import (
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    print_conditions,
    print_table,
)
from numpy.typing import NDArray
from scipy import stats

from minga.inference.monitor.indices import bin_counts, shift_of, stability_index
from minga.inference.monitor.judgement import MIN_SHIFT, MIN_STABILITY, Key, Streak, follow, judge
from minga.inference.monitor.reference import Reference
from minga.inference.monitor.sketch import Sketch
from minga.training.profile import profile_columns

NUM_COLUMNS: Final = 10
NUM_REFERENCE: Final = 1000
WINDOWS_A_DAY: Final = 100
HARMLESS: Final = 0.1
SHIFTS: Final = (0.3, 0.5, 1.0)
MOST_WINDOWS: Final = 50
SOON: Final = 5

Counts = NDArray[np.int64]
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is tried."""

    sizes: tuple[int, ...]
    days: int
    delays: int
    rival_days: int
    rival_delays: int


FULL: Final = Scale(
    sizes=(50, 100, 200, 500, 1000, 2000, 5000, 10_000),
    days=500,
    delays=200,
    rival_days=10,
    rival_delays=40,
)
QUICK: Final = Scale(sizes=(50, 500, 5000), days=30, delays=20, rival_days=1, rival_delays=4)


def psi(values: Values, _: Values, known: "Known") -> bool:
    """Say whether PSI is above its usual threshold."""
    counts = bin_counts(known.edges, values)
    return bool(stability_index(known.shares, counts) > 0.2)


def kolmogorov(values: Values, sample: Values, _: "Known") -> bool:
    """Say whether the test of Kolmogorov and Smirnov is significant at its usual level."""
    return bool(stats.ks_2samp(values, sample, method="asymp").pvalue < 0.05)


def wasserstein(values: Values, sample: Values, _: "Known") -> bool:
    """Say whether the distance in deviations of the reference is above its usual threshold."""
    return bool(stats.wasserstein_distance(values, sample) / sample.std() > 0.1)


RIVALS: Final[dict[str, Callable[[Values, Values, "Known"], bool]]] = {
    "PSI > 0.2": psi,
    "KS p < 0.05": kolmogorov,
    "Wasserstein > 0.1": wasserstein,
}


@dataclass(frozen=True, slots=True)
class Known:
    """One column of a reference."""

    edges: Values
    shares: Values


@dataclass(frozen=True, slots=True)
class World:
    """A reference, drawn anew: its sample, its columns, and what judges against it."""

    sample: Values  # (NUM_REFERENCE, NUM_COLUMNS)
    known: tuple[Known, ...]
    reference: Reference


def draw_world(generator: np.random.Generator) -> World:
    """Draw training data, and profile it as training does."""
    sample = generator.normal(size=(NUM_REFERENCE, NUM_COLUMNS))
    profiles = profile_columns(sample)
    columns = [
        {
            "role": "input",
            "name": profile.name,
            "edges": profile.edges,
            "shares": profile.shares,
            "num_examples": NUM_REFERENCE,
        }
        for profile in profiles
    ]
    given = {"layout": 1, "num_held_out": NUM_REFERENCE, "columns": columns}
    known = tuple(Known(np.array(one.edges), np.array(one.shares)) for one in profiles)
    return World(sample, known, Reference.parse(json.dumps(given)))


def draw_counts(
    world: World, generator: np.random.Generator, size: int, num_windows: int, shift: float
) -> list[Counts]:
    """Draw windows as counts; the first column has moved.

    Returns:
        For each column counts of shape `(windows, bins)`.
    """
    counts = []
    for place, known in enumerate(world.known):
        edges = known.edges - (shift if place == 0 else 0.0)
        law = np.diff(stats.norm.cdf(edges), prepend=0.0, append=1.0)
        counts.append(generator.multinomial(size, law, num_windows))
    return counts


def large(world: World, counts: list[Counts]) -> NDArray[np.bool_]:
    """Say in which windows any statistic is large enough to count, shape `(windows,)`."""
    # The shift rises with the mean ridit, so the limit can be looked up once.
    limit = stats.norm.cdf(MIN_SHIFT / math.sqrt(2)) - 0.5
    assert math.isclose(shift_of(0.5 + limit), MIN_SHIFT, rel_tol=1e-6)
    found = np.zeros(len(counts[0]), bool)
    for known, column in zip(world.known, counts, strict=True):
        ridits = np.cumsum(known.shares) - known.shares / 2
        means = column @ ridits / column.sum(axis=1)
        found |= np.abs(means - 0.5) >= limit * (1 - 1e-9)
        found |= stability_index(known.shares, column) >= MIN_STABILITY
    return found


def first_alarm(world: World, counts: list[Counts], size: int) -> int | None:
    """Give the number of the window, from 1, with which Minga raises an alarm; None if never."""
    streaks: dict[Key, Streak] = {}
    for number, is_candidate in enumerate(large(world, counts)):
        if not is_candidate:
            streaks = {}
            continue
        sketch = Sketch(world.reference, rows=size, counts=[one[number] for one in counts])
        sketch.missing, sketch.outside, sketch.unknown = np.zeros((3, NUM_COLUMNS), np.int64)
        streaks, changes = follow(streaks, judge(sketch).findings, since=0.0)
        if changes:
            return number + 1
    return None


def alarm_days(size: int, shift: float, num_days: int, seed: int) -> float:
    """Give the share of days with an alarm of ours."""
    generator = np.random.default_rng([seed, size])
    alarmed = 0
    for _ in range(num_days):
        world = draw_world(generator)
        counts = draw_counts(world, generator, size, WINDOWS_A_DAY, shift)
        alarmed += first_alarm(world, counts, size) is not None
    return alarmed / num_days


def delays(size: int, shift: float, num_runs: int, seed: int) -> list[float]:
    """Give after how many windows ours raises an alarm; infinite if not within the most."""
    generator = np.random.default_rng([seed, size])
    found = []
    for _ in range(num_runs):
        world = draw_world(generator)
        counts = draw_counts(world, generator, size, MOST_WINDOWS, shift)
        found.append(float(first_alarm(world, counts, size) or math.inf))
    return found


def rival_windows(
    generator: np.random.Generator, size: int, num_windows: int, shift: float
) -> Iterator[Values]:
    """Draw windows value by value, shape `(size, columns)`."""
    for _ in range(num_windows):
        values = generator.normal(size=(size, NUM_COLUMNS))
        values[:, 0] += shift
        yield values


def rival_days(size: int, shift: float, num_days: int, seed: int) -> dict[str, dict[str, float]]:
    """Give, for each rival, the share of windows and of days with an alarm; ours beside them."""
    generator = np.random.default_rng([seed, size])
    windows: dict[str, list[bool]] = {name: [] for name in RIVALS}
    days: dict[str, list[bool]] = {name: [] for name in (*RIVALS, "Minga")}
    for _ in range(num_days):
        world = draw_world(generator)
        today: dict[str, list[bool]] = {name: [] for name in RIVALS}
        counts: list[list[Counts]] = [[] for _ in range(NUM_COLUMNS)]
        for values in rival_windows(generator, size, WINDOWS_A_DAY, shift):
            for place, known in enumerate(world.known):
                counts[place].append(bin_counts(known.edges, values[:, place]))
            for name, is_alarm in RIVALS.items():
                today[name].append(any_column(is_alarm, world, values))
        for name, alarms in today.items():
            windows[name] += alarms
            days[name].append(any(alarms))
        days["Minga"].append(
            first_alarm(world, [np.array(column) for column in counts], size) is not None
        )
    return {
        name: {
            "days": statistics.fmean(days[name]),
            "windows": statistics.fmean(windows[name]) if name in windows else math.nan,
        }
        for name in days
    }


def any_column(
    is_alarm: Callable[[Values, Values, Known], bool], world: World, values: Values
) -> bool:
    """Say whether a rival alarms of any column of a window."""
    return any(
        is_alarm(values[:, place], world.sample[:, place], known)
        for place, known in enumerate(world.known)
    )


def rival_soon(size: int, shift: float, num_runs: int, seed: int) -> dict[str, float]:
    """Give how often each rival alarms of the moved column within few windows."""
    generator = np.random.default_rng([seed, size])
    soon = dict.fromkeys(RIVALS, 0)
    for _ in range(num_runs):
        world = draw_world(generator)
        windows = list(rival_windows(generator, size, SOON, shift))
        for name, is_alarm in RIVALS.items():
            soon[name] += any(
                is_alarm(values[:, 0], world.sample[:, 0], world.known[0]) for values in windows
            )
    return {name: count / num_runs for name, count in soon.items()}


def measure(size: int, scale: Scale, *, with_rivals: bool) -> dict[str, Any]:
    """Try one size of windows."""
    case: dict[str, Any] = {
        "size": size,
        "false_alarm_days": alarm_days(size, 0.0, scale.days, 1),
        "needless_alarm_days": alarm_days(size, HARMLESS, scale.delays, 2),
        "delays": {},
    }
    for shift in SHIFTS:
        found = delays(size, shift, scale.delays, 3)
        middle = statistics.median(found)
        case["delays"][str(shift)] = {
            "median": None if math.isinf(middle) else middle,
            "soon": statistics.fmean(one <= SOON for one in found),
        }
    if with_rivals:
        case["rivals"] = {
            "no shift": rival_days(size, 0.0, scale.rival_days, 4),
            "harmless": rival_days(size, HARMLESS, max(scale.rival_days // 5, 1), 5),
            "soon": rival_soon(size, SHIFTS[0], scale.rival_delays, 6),
        }
    print(".", end="", file=sys.stderr, flush=True)
    return case


def print_cases(cases: list[dict[str, Any]], scale: Scale) -> None:
    """Print what ours does, and how rivals compare."""
    rows = [
        [
            str(case["size"]),
            f"{case['false_alarm_days']:.1%}",
            f"{case['needless_alarm_days']:.1%}",
            *(
                f"{one['median'] or f'>{MOST_WINDOWS}'} ({one['soon']:.0%})"
                for one in case["delays"].values()
            ),
        ]
        for case in cases
    ]
    moved = [f"moved by {shift} sd" for shift in SHIFTS]
    print_table(
        f"Minga: days with an alarm ({scale.days} days without a change), and windows until one "
        f"(median, and share within {SOON})",
        ("rows", "no change", f"harmless {HARMLESS} sd", *moved),
        rows,
    )
    if "rivals" not in cases[0]:
        return
    rows = []
    for case in cases:
        rivals = case["rivals"]
        for name in ("Minga", *RIVALS):
            quiet = rivals["no shift"][name]
            soon = (
                case["delays"][str(SHIFTS[0])]["soon"] if name == "Minga" else rivals["soon"][name]
            )
            rows.append(
                [
                    str(case["size"]),
                    name,
                    "" if math.isnan(quiet["windows"]) else f"{quiet['windows']:.1%}",
                    f"{quiet['days']:.0%}",
                    f"{rivals['harmless'][name]['days']:.0%}",
                    f"{soon:.0%}",
                ]
            )
        rows.append([])
    columns = (
        "rows",
        "rule",
        "windows, no change",
        "days, no change",
        f"days, {HARMLESS} sd",
        f"{SHIFTS[0]} sd within {SOON}",
    )
    print_table("Beside fixed thresholds, on the same values", columns, rows)


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    scale = QUICK if options.quick else FULL
    under = conditions(["numpy", "scipy"])
    print_conditions(under)
    with ending_cleanly():
        cases = [measure(size, scale, with_rivals=not options.ours_only) for size in scale.sizes]
    print(file=sys.stderr)
    print_cases(cases, scale)
    middle = next(case for case in cases if case["size"] == 500)
    worst = max(case["false_alarm_days"] for case in cases)
    delay = middle["delays"]["0.3"]
    targets = [
        Target(name="drift.false_alarm_days", value=worst, goal="<=0.01"),
        Target(name="drift.windows_to_0.3sd_of_500", value=delay["median"] or math.inf, goal="<=5"),
        Target(name="drift.share_within_5_windows", value=delay["soon"], goal=">=0.95"),
    ]
    report = {"benchmark": "drift", "quick": options.quick, "conditions": under, "cases": cases}
    conclude(report, targets, options.json)


if __name__ == "__main__":
    main()
