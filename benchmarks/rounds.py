"""Whole rounds of real processes: Minga, Flower, and what gRPC allows.

A coordinator process and device processes talk over gRPC with mutual TLS on this machine; every
device returns weights of its own, which takes its trainer no time. Flower does the same with a
SuperLink and SuperNodes, without TLS; the limit is a bare grpc.aio loop with mutual TLS that moves
as many bytes and writes nothing down. A round lasts from the order that sends devices to work until
the next model is there: with us, on the disk. Runs alternate; while one side runs, the other stands
still. Each run's first round is apart. Secure rounds are those that are shipped: rotated, 17 bits.
"""

import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from harness import (
    Rival,
    RivalError,
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    pinned,
    print_conditions,
    print_table,
    rival_python,
)
from processes import Processes
from rivals.rounds_work import Case, Runs, expected, status_bytes

from minga.federation.config import FederationConfig
from minga.federation.operator import connect
from minga.federation.parameters import Parameters, from_bytes, to_bytes
from minga.federation.v1 import federation_pb2 as pb

SHIPPED: Final = FederationConfig()
"""What a project gets that says nothing in its `[federation]` table."""

PROTECTIONS: Final = {"plain": pb.PROTECTION_PLAIN, "secure": pb.PROTECTION_SECURE}
RATIO_GOALS: Final = {(8, 1_000_000): 80, (32, 1_000_000): 50, (8, 40_000_000): 12}
"""Devices and bytes of the model -> how many times faster than Flower a plain round is to be."""

SECURE_GOAL: Final = 2
"""A secure round may take so many times a plain one."""

MEMORY_GOAL: Final = 3
"""The coordinator may grow by so many models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    cases: tuple[Case, ...]
    num_repeats: int
    num_rounds: int
    """In each of our runs, the cold one included."""
    num_rival_rounds: int


FULL: Final = Scale(
    cases=(
        Case(num_devices=8, num_values=250_000),
        Case(num_devices=32, num_values=250_000),
        Case(num_devices=8, num_values=10_000_000),
    ),
    num_repeats=5,
    num_rounds=6,
    num_rival_rounds=2,
)
QUICK: Final = Scale(
    cases=(Case(num_devices=4, num_values=250_000),),
    num_repeats=2,
    num_rounds=4,
    num_rival_rounds=2,
)


# -- ours --


def campaign_plan(case: Case, protection: str, num_rounds: int) -> pb.CampaignPlan:
    """Ask for rounds of all devices, with what a project gets that asks for nothing else."""
    return pb.CampaignPlan(
        model_name="rounds",
        num_rounds=num_rounds,
        cohort=case.num_devices,
        min_cohort=case.num_devices,
        value_bits=SHIPPED.value_bits,
        clip=SHIPPED.clip,
        max_weight=SHIPPED.max_weight,
        rotate=SHIPPED.rotate,
        server_learning_rate=1.0,
        invite_timeout_s=60,
        stage_timeout_s=60,
        training_timeout_s=60,
        expected_dropout=SHIPPED.expected_dropout,
        colluder_share=SHIPPED.colluder_share,
        protection=PROTECTIONS[protection],  # type: ignore[arg-type]
    )


async def run_campaign(processes: Processes, case: Case, protection: str, num_rounds: int) -> Runs:
    """Run a campaign from a model of zeros and check what it comes to."""
    pid = processes.coordinator.pid
    idle_bytes = status_bytes(pid, "VmRSS")
    # "5" resets the peak: proc_pid_clear_refs(5).
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    halves = np.split(np.zeros(case.num_values, np.float32), 2)
    model: Parameters = {"first": halves[0], "second": halves[1]}
    plan = campaign_plan(case, protection, num_rounds)
    async with connect(processes.state) as operator:
        name = await operator.start_campaign(plan, to_bytes(model))
        states = [state async for state in operator.watch(name)]
        peak_bytes = status_bytes(pid, "VmHWM")
        result = from_bytes(await operator.read(states[-1].model_digest))
    last = states[-1]
    if last.state != pb.CAMPAIGN_STATE_COMPLETED:
        raise RuntimeError(f"the campaign failed: {last.reason}")
    for record in last.rounds:  # nobody got away with sending nothing
        if len(record.survivors) != case.num_devices:
            raise RuntimeError(f"round {record.round_id} lost devices: {dict(record.lost)}")
        least = case.num_devices * case.model_bytes // (1 if protection == "plain" else 2)
        assert record.bytes_received >= least, record
    right = expected(case, num_rounds)
    return _runs(last.rounds, idle_bytes, peak_bytes, _distance(result, right))


def _runs(records: Sequence[pb.Round], idle_bytes: int, peak_bytes: int, error: float) -> Runs:
    starts = [record.started_at.ToNanoseconds() / 1e9 for record in records]
    ends = [record.ended_at.ToNanoseconds() / 1e9 for record in records]
    took = [end - start for start, end in zip(starts, ends, strict=True)]
    return Runs(
        first_s=took[0],
        rounds_s=tuple(took[1:]),
        period_s=(starts[-1] - starts[1]) / (len(starts) - 2),
        idle_bytes=idle_bytes,
        peak_bytes=peak_bytes,
        max_error=error,
    )


def _distance(model: Parameters, value: float) -> float:
    return max(float(np.abs(tensor - np.float32(value)).max()) for tensor in model.values())


# -- all of it --


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All runs of one case."""

    case: Case
    idle_bytes: int
    """The coordinator when all devices have connected, before its first round."""
    runs: dict[str, tuple[Runs, ...]]
    """By who ran: plain, secure, limit, flower."""


def measure(case: Case, scale: Scale, limit: Rival, flower: Rival | None) -> Result:
    """Run a case: ours plain and secure, the limit, Flower, and again."""
    runs: dict[str, list[Runs]] = {}
    asked = {"num_devices": case.num_devices, "num_values": case.num_values}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rounds-")))
        processes = stack.enter_context(Processes(folder, case.num_devices))
        idle_bytes = status_bytes(processes.coordinator.pid, "VmRSS")
        for _ in range(scale.num_repeats):
            if flower:
                flower.ask({"pause": True})
            for protection in PROTECTIONS:
                ours = run_campaign(processes, case, protection, scale.num_rounds)
                runs.setdefault(protection, []).append(asyncio.run(ours))
            answer = limit.ask({**asked, "num_rounds": scale.num_rounds})
            runs.setdefault("limit", []).append(_from_json(answer))
            if flower:
                answer = flower.ask({**asked, "num_rounds": scale.num_rival_rounds})
                runs.setdefault("flower", []).append(_from_json(answer))
            print(".", end="", file=sys.stderr, flush=True)
    return Result(
        case=case, idle_bytes=idle_bytes, runs={who: tuple(some) for who, some in runs.items()}
    )


def _from_json(answer: dict[str, Any]) -> Runs:
    return Runs(**{**answer, "rounds_s": tuple(answer["rounds_s"])})


def round_s(runs: Sequence[Runs]) -> float:
    """Give the median round, the cold ones left out."""
    return statistics.median(took for one in runs for took in one.rounds_s)


def growth(result: Result, who: str) -> float:
    """Say by how many models the coordinator grew from idle at the most."""
    peak = max(one.peak_bytes for one in result.runs[who])
    return (peak - result.idle_bytes) / result.case.model_bytes


COLUMNS: Final = (
    "devices x model",
    "",
    "rounds",
    "round s",
    "fastest",
    "first",
    "period s",
    "idle MB",
    "peak MB",
    "max error",
    "Flower's time",
)

LEGEND: Final = """\
round: from order to commit, median; first: median of the runs' first rounds; period: from order to
order; idle, peak: all processes of the server (ours: one); Flower's time: so many times a round of
this row."""


def print_results(results: Sequence[Result], names: dict[str, str]) -> None:
    """Print a row for each side."""
    rows: list[list[str]] = []
    for result in results:
        title = str(result.case)
        theirs = result.runs.get("flower")
        for who, runs in result.runs.items():
            ratio = f"{round_s(theirs) / round_s(runs):.1f}x" if theirs else ""
            rows.append([title, names[who], *_cells(runs), ratio])
            title = ""
        rows.append([])
    print_table("Rounds that only move weights", COLUMNS, rows)
    print(LEGEND)


def _cells(runs: Sequence[Runs]) -> list[str]:
    took = [took for one in runs for took in one.rounds_s]
    return [
        str(len(took)),
        f"{statistics.median(took):.3f}",
        f"{min(took):.3f}",
        f"{statistics.median(one.first_s for one in runs):.3f}",
        f"{statistics.median(one.period_s for one in runs):.3f}",
        f"{statistics.median(one.idle_bytes for one in runs) / 1e6:.0f}",
        f"{max(one.peak_bytes for one in runs) / 1e6:.0f}",
        f"{max(one.max_error for one in runs):.0e}",
    ]


def targets(results: Sequence[Result]) -> Iterator[Target]:
    """Compare with what is to be reached, as far as it was measured."""
    for result in results:
        case, runs = result.case, result.runs
        name = f"rounds_{case.num_devices}x{case.model_bytes / 1e6:g}mb"
        goal = RATIO_GOALS.get((case.num_devices, case.model_bytes))
        if goal and "flower" in runs:
            ratio = round_s(runs["flower"]) / round_s(runs["plain"])
            yield Target(name=f"{name}_ratio", value=ratio, goal=f">={goal}")
        secure = round_s(runs["secure"]) / round_s(runs["plain"])
        yield Target(name=f"{name}_secure_to_plain", value=secure, goal=f"<={SECURE_GOAL}")
        for who in PROTECTIONS:
            models = growth(result, who)
            yield Target(name=f"{name}_{who}_peak_models", value=models, goal=f"<={MEMORY_GOAL}")


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--case", choices=[str(case) for case in FULL.cases], help="this one alone")
    options = parser.parse_args()
    scale = QUICK if options.quick else FULL
    cases = [case for case in FULL.cases if str(case) == options.case] or scale.cases
    under = conditions(["minga", "grpcio", "protobuf", "cryptography", "numpy"])
    under["runs"] = (
        f"{scale.num_repeats} of each side in turn, with {scale.num_rounds} rounds in one of ours "
        f"and of bare gRPC, {scale.num_rival_rounds} in one of Flower's; each one's first is apart"
    )
    with ending_cleanly(), ExitStack() as stack:
        flower = None
        if not options.ours_only:
            try:
                flower = stack.enter_context(Rival(rival_python("flwr"), "rivals.flower_rounds"))
            except RivalError as error:
                print(f"Flower is left out: {error}", file=sys.stderr)
        print_conditions(under)
        limit = stack.enter_context(Rival(Path(sys.executable), "bare_rounds"))
        try:
            results = [measure(case, scale, limit, flower) for case in cases]
        except RivalError as error:
            sys.exit(f"\na rival failed: {error}; see what we reach with --ours-only")
    print(file=sys.stderr)
    under["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
    print(f"load average at the end: {' '.join(map(str, under['load_average_at_end']))}")
    rival = pinned("flwr").replace("flwr==", "Flower ")
    names = {"plain": "Minga, plain", "secure": "Minga, secure", "limit": "grpc.aio alone"}
    print_results(results, {**names, "flower": rival})
    report = {
        "benchmark": "rounds",
        "quick": options.quick,
        "conditions": {**under, "rival": rival if flower else None},
        "settings": SHIPPED.model_dump(include={"rotate", "value_bits", "clip", "max_weight"}),
        "cases": [_as_json(result) for result in results],
    }
    conclude(report, sorted(targets(results), key=lambda target: target.name), options.json)


def _as_json(result: Result) -> dict[str, Any]:
    medians = {who: round_s(runs) for who, runs in result.runs.items()}
    return {**asdict(result), "median_round_s": medians}


if __name__ == "__main__":
    main()
