"""Secure aggregation of one model: Minga, Flower's SecAgg+, and what the processor allows.

Each round is driven in one process, without a network: real keys, certificates and signatures on
our side, Flower's own client mod and server workflow on the other, on the same updates, with the
same neighbours and threshold. Runs alternate. The limit is what no protocol of this kind can beat:
generating as many masks with AES-128-CTR and adding them with numpy, on as many cores as we use.

Minga rounds as it is shipped: differences, rotated, in 17 bits, clipped at 2, weighed up to 4096.
Flower sends weights, in 2**22 levels over [-8, 8]. How exact that leaves each is in the table.
Where a round of Flower's takes long, it is run less often than ours; the table counts the runs.
"""

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from harness import (
    PeakMemory,
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
from rivals.secagg_work import (
    Case,
    Measurement,
    draw_update,
    exact_mean,
    survivors,
    weight_of,
)

from minga.federation.config import FederationConfig
from minga.federation.coordinator.authority import Authority
from minga.federation.identity import CertificateVerifier, Identity, Role, make_csr, new_key
from minga.federation.secagg.coordinator import (
    MaskedSum,
    Unmasked,
    check_advert,
    check_confirmation,
    check_reveal,
    check_shares,
    unmask,
)
from minga.federation.secagg.device import DeviceSession
from minga.federation.secagg.graph import neighbours
from minga.federation.secagg.masking import split_range
from minga.federation.secagg.plan import ROUND_ID_BYTES, RoundPlan, context_digest
from minga.federation.secagg.sizing import choose_neighbourhood

SHIPPED: Final = FederationConfig()
"""What a project gets that says nothing in its `[federation]` table."""

LOST_SHARE: Final = 0.2
COLLUDER_SHARE: Final = 0.1
PIECE_BYTES: Final = 1 << 18
"""Uploads come to the coordinator in pieces of this size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    num_values: int
    cohorts: tuple[int, ...]
    num_repeats: int
    slow_s: float
    """A case of the rival whose first run takes longer is repeated `num_slow_repeats` times."""
    num_slow_repeats: int


FULL: Final = Scale(
    num_values=1_000_000, cohorts=(8, 32, 64), num_repeats=5, slow_s=20, num_slow_repeats=2
)
QUICK: Final = Scale(
    num_values=100_000, cohorts=(8, 32), num_repeats=3, slow_s=2, num_slow_repeats=1
)


def make_cases(scale: Scale) -> list[Case]:
    """Give the complete graph for each cohort, and the sparse one where Minga derives it."""
    cases = []
    for cohort in scale.cohorts:
        derived = choose_neighbourhood(cohort, LOST_SHARE, COLLUDER_SHARE)
        graphs = [(cohort - 1, (cohort - 1 + math.ceil(COLLUDER_SHARE * cohort)) // 2 + 1)]
        if derived.num_neighbours < cohort - 1:
            graphs.append((derived.num_neighbours, derived.threshold))
        cases += [
            Case(
                num_values=scale.num_values,
                num_devices=cohort,
                num_lost=num_lost,
                num_neighbours=num_neighbours,
                threshold=threshold,
            )
            for num_neighbours, threshold in graphs
            for num_lost in (0, round(LOST_SHARE * cohort))
        ]
    return cases


# -- ours --


class Fleet:
    """Devices with identities that one authority issued."""

    def __init__(self, folder: Path, num_devices: int) -> None:
        authority = Authority.open(folder)
        self.verifier = CertificateVerifier(authority=authority.certificate)
        self.identities = []
        for number in range(num_devices):
            key, name = new_key(), f"device-{number:03}"
            certificate = authority.issue_client(Role.DEVICE, name, make_csr(key, name))
            self.identities.append(Identity.of(key, certificate, authority.certificate))


class Round:
    """One round of ours: devices and coordinator in turn, each one's time kept."""

    def __init__(self, fleet: Fleet, case: Case) -> None:
        self.case = case
        self.plan = RoundPlan(
            round_id=os.urandom(ROUND_ID_BYTES),
            context_digest=context_digest(bytes(32), {}),
            num_values=case.num_values,
            max_cohort=case.num_devices,
            num_neighbours=case.num_neighbours,
            threshold=case.threshold,
            value_bits=SHIPPED.value_bits,
            clip=SHIPPED.clip,
            max_weight=SHIPPED.max_weight,
            rotate=SHIPPED.rotate,
        )
        self.verifier = fleet.verifier
        identities = fleet.identities[: case.num_devices]
        self.numbers = {one.device_id: number for number, one in enumerate(identities)}
        self.sessions = {
            one.device_id: DeviceSession(self.plan, one, fleet.verifier) for one in identities
        }
        self.survivors = [identities[number].device_id for number in survivors(case)]
        self.num_masks, self.limit_s = 0, 0.0
        self.device_s = dict.fromkeys(self.sessions, 0.0)
        self.finish_s = dict.fromkeys(self.sessions, 0.0)

    def run(self) -> Measurement:
        """Take all steps, and time the limit for as many masks."""
        self._exchange_secrets()
        uploads = self._mask()
        memory = PeakMemory()
        memory.start()
        total, sum_s = _timed(self._add, uploads)
        self._reveal()
        unmasked, unmask_s = _timed(self._unmask, total)
        peak_bytes = memory.stop()
        # Right beside what it is compared with: the load of a shared machine comes in bursts.
        self.num_masks = num_masks_left(self)
        self.limit_s = limit_s(self.num_masks, self.plan.vector_length)
        error = np.abs(unmasked.mean_delta - exact_mean(self.case)).max()
        return Measurement(
            device_s=statistics.median(self.device_s[name] for name in self.survivors),
            finish_s=statistics.median(self.finish_s[name] for name in self.survivors),
            sum_s=sum_s,
            unmask_s=unmask_s,
            upload_bytes=len(uploads[0]),
            server_peak_bytes=peak_bytes,
            max_error=float(error),
        )

    def _exchange_secrets(self) -> None:
        self.adverts = {
            name: _added(self.device_s, name, session.advertise)
            for name, session in self.sessions.items()
        }
        for advert in self.adverts.values():
            check_advert(self.plan, self.verifier, advert)
        self.graph = neighbours(self.adverts, self.plan.num_neighbours, self.plan.round_id)
        self.shares = {}
        for name, session in self.sessions.items():
            adverts = [self.adverts[peer] for peer in self.graph[name]]
            shares = _added(self.device_s, name, session.share, adverts)
            check_shares(self.graph, name, shares)
            self.shares[name] = {share.receiver: share for share in shares}

    def _mask(self) -> list[bytes]:
        uploads = []
        for name in self.survivors:
            inbox = [self.shares[peer][name] for peer in self.graph[name]]
            update = draw_update(self.case, self.numbers[name])
            weight = weight_of(self.numbers[name])
            mask = self.sessions[name].mask
            uploads.append(_added(self.device_s, name, mask, inbox, update, weight))
        return uploads

    def _add(self, uploads: Sequence[bytes]) -> MaskedSum:
        total = MaskedSum(self.plan)
        for upload in uploads:
            view = memoryview(upload)
            starts = range(0, len(view), PIECE_BYTES)
            total.add_chunks(view[start : start + PIECE_BYTES] for start in starts)
        return total

    def _reveal(self) -> None:
        confirmations = {
            name: _added(self.finish_s, name, self.sessions[name].confirm, self.survivors)
            for name in self.survivors
        }
        for name, confirmation in confirmations.items():
            advert = self.adverts[name]
            check_confirmation(self.plan, self.verifier, advert, self.survivors, confirmation)
        self.reveals = {}
        for name in self.survivors:
            given = [confirmations[peer] for peer in self.graph[name] if peer in confirmations]
            self.reveals[name] = _added(self.finish_s, name, self.sessions[name].reveal, given)

    def _unmask(self, total: MaskedSum) -> Unmasked:
        for reveal in self.reveals.values():
            check_reveal(self.graph, self.sessions, self.survivors, reveal)
        return unmask(
            plan=self.plan,
            graph=self.graph,
            adverts=self.adverts,
            sharers=list(self.sessions),
            survivors=self.survivors,
            reveals=self.reveals,
            masked_sum=total,
        )


def _timed(step: Callable[..., Any], *given: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = step(*given)
    return result, time.perf_counter() - start


def _added(seconds: dict[str, float], name: str, step: Callable[..., Any], *given: Any) -> Any:
    """Take a device's step, and add what it took to the device's time."""
    result, took_s = _timed(step, *given)
    seconds[name] += took_s
    return result


# -- the limit --


def num_masks_left(round_: Round) -> int:
    """Count the masks in a sum: the survivors' own, and those that they share with lost devices."""
    lost = round_.sessions.keys() - set(round_.survivors)
    alive = set(round_.survivors)
    return len(alive) + sum(len(alive.intersection(round_.graph[name])) for name in lost)


def limit_s(num_masks: int, num_values: int) -> float:
    """Time generating and adding masks, with nothing around it."""
    values = np.zeros(num_values, np.uint32)
    keys = [os.urandom(16) for _ in range(num_masks)]
    # AES and the addition leave the interpreter's lock, so threads are no handicap.
    parts = split_range(num_values, os.cpu_count() or 1)
    with ThreadPoolExecutor(len(parts)) as pool:
        start = time.perf_counter()
        list(pool.map(lambda part: _add_keystreams(values[part.start : part.stop], keys), parts))
        return time.perf_counter() - start


def _add_keystreams(values: np.ndarray, keys: Sequence[bytes]) -> None:
    block_values = 1 << 16
    zeros, scratch = memoryview(bytes(4 * block_values)), bytearray(4 * block_values + 16)
    masks = np.frombuffer(scratch, np.uint32, block_values)
    streams = [Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor() for key in keys]
    for low in range(0, values.size, block_values):
        block = values[low : low + block_values]
        for stream in streams:
            stream.update_into(zeros[: block.nbytes], scratch)
            np.add(block, masks[: block.size], out=block)


# -- all of it --


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All runs of one case."""

    case: Case
    num_masks: int
    ours: tuple[Measurement, ...]
    limit_s: tuple[float, ...]
    flower: tuple[Measurement, ...]


def measure(case: Case, scale: Scale, fleet: Fleet, flower: Rival | None) -> Result:
    """Run a case: ours, the limit, Flower, and again."""
    ours, limits, theirs = [], [], []
    num_flower = scale.num_repeats if flower else 0
    for repeat in range(scale.num_repeats):
        round_ = Round(fleet, case)
        ours.append(round_.run())
        limits.append(round_.limit_s)
        num_masks = round_.num_masks
        del round_  # with what its devices keep
        if flower and repeat < num_flower:
            answer, took_s = _timed(flower.ask, asdict(case))
            theirs.append(Measurement(**answer))
            if took_s > scale.slow_s:
                num_flower = scale.num_slow_repeats
        print(".", end="", file=sys.stderr, flush=True)
    return Result(
        case=case,
        num_masks=num_masks,
        ours=tuple(ours),
        limit_s=tuple(limits),
        flower=tuple(theirs),
    )


def medians(runs: Sequence[Measurement]) -> Measurement:
    """Give each figure's median."""
    names = [one.name for one in fields(Measurement)]
    return Measurement(
        **{name: statistics.median(getattr(run, name) for run in runs) for name in names}
    )


COLUMNS: Final = (
    "round",
    "",
    "runs",
    "device ms",
    "finish ms",
    "upload B/value",
    "sum ms",
    "unmask ms",
    "AES limit ms",
    "peak MB",
    "max error",
)

LEGEND: Final = f"""\
device: keys, shares and mask of one device; finish: its part in unmasking; sum: adding all masked
updates; unmask: from the revealed shares to the mean; AES limit: as many masks generated and added
with nothing around; peak: growth of the server's process from the first masked update on.
Minga and the limit unmask on {os.cpu_count()} cores; Flower's code uses one."""


def print_results(results: Sequence[Result], flower: str) -> None:
    """Print three rows for each case: ours, Flower's, the ratio."""
    rows: list[list[str]] = []
    for result in results:
        case = result.case
        what = f"{case.num_devices} devices, {case.num_neighbours} neighbours, {case.num_lost} lost"
        limit = f"{1e3 * statistics.median(result.limit_s):.1f}"
        rows.append([what, "Minga", *_cells(case, result.ours, limit)])
        if result.flower:
            rows.append(["", flower, *_cells(case, result.flower, "")])
            rows.append(["", "ratio", "", *_ratios(medians(result.ours), medians(result.flower))])
        rows.append([])
    num_values = results[0].case.num_values
    print_table(f"One round over {num_values:,} float32 parameters, medians", COLUMNS, rows)
    print(LEGEND)


def _cells(case: Case, runs: Sequence[Measurement], limit: str) -> list[str]:
    one = medians(runs)
    return [
        str(len(runs)),
        f"{1e3 * one.device_s:.1f}",
        f"{1e3 * one.finish_s:.1f}",
        f"{one.upload_bytes / case.num_values:.2f}",
        f"{1e3 * one.sum_s:.1f}",
        f"{1e3 * one.unmask_s:.1f}",
        limit,
        f"{one.server_peak_bytes / 1e6:.1f}",
        f"{one.max_error:.1e}",
    ]


def _ratios(ours: Measurement, theirs: Measurement) -> list[str]:
    def times(name: str) -> str:
        below = getattr(ours, name)
        return f"{getattr(theirs, name) / below:.1f}x" if below else ""

    return [
        times("device_s"),
        "",
        times("upload_bytes"),
        times("sum_s"),
        times("unmask_s"),
        "",
        times("server_peak_bytes"),
        "",
    ]


def targets(results: Sequence[Result]) -> list[Target]:
    """Compare with what is to be reached, as far as it was measured; over complete graphs."""
    complete = [one for one in results if one.case.num_neighbours == one.case.num_devices - 1]
    found = [target for result in complete for target in _own_targets(result)]
    found += [target for result in complete if result.flower for target in _ratio_targets(result)]
    return sorted(found, key=lambda target: target.name)


def _own_targets(result: Result) -> Iterator[Target]:
    case, ours = result.case, medians(result.ours)
    pairs = zip(result.ours, result.limit_s, strict=True)
    share = statistics.median(run.unmask_s / limit for run, limit in pairs)
    yield Target(name=_name("unmask_to_limit", case), value=share, goal="<=2")
    # To the hundredth: the weight and the padding are another 32 bytes at most.
    per_value = round(ours.upload_bytes / case.num_values, 2)
    yield Target(name=_name("upload_bytes", case), value=per_value, goal="<=3")


def _ratio_targets(result: Result) -> Iterator[Target]:
    case, ours, theirs = result.case, medians(result.ours), medians(result.flower)
    goals = {(32, 0): ">=60", (32, 6): ">=25", (64, 0): ">=100"}
    goal = goals.get((case.num_devices, case.num_lost))
    if goal:
        value = theirs.unmask_s / ours.unmask_s
        yield Target(name=_name("unmask_ratio", case), value=value, goal=goal)
    if case.num_devices == 32:
        value = theirs.device_s / ours.device_s
        yield Target(name=_name("device_ratio", case), value=value, goal=">=6")


def _name(what: str, case: Case) -> str:
    return f"secagg.{what}_{case.num_devices}_devices_{case.num_lost}_lost"


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    scale = QUICK if options.quick else FULL
    under = conditions(["cryptography", "numpy"])
    under["runs"] = (
        f"{scale.num_repeats} of ours in each case; of Flower's as many, or "
        f"{scale.num_slow_repeats} where the first takes over {scale.slow_s:g} s"
    )
    with ending_cleanly(), ExitStack() as stack:
        flower = None
        if not options.ours_only:
            try:
                flower = stack.enter_context(Rival(rival_python("flwr"), "rivals.flower_secagg"))
            except RivalError as error:
                print(f"Flower is left out: {error}", file=sys.stderr)
        print_conditions(under)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fleet = Fleet(folder, max(scale.cohorts))
        try:
            results = [measure(case, scale, fleet, flower) for case in make_cases(scale)]
        except RivalError as error:
            sys.exit(f"\nFlower failed: {error}; see what the others reach with --ours-only")
    print(file=sys.stderr)
    under["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
    rival = pinned("flwr").replace("flwr==", "Flower ")
    print_results(results, rival)
    report = {
        "benchmark": "secagg",
        "quick": options.quick,
        "conditions": {**under, "rival": rival if flower else None},
        "settings": SHIPPED.model_dump(include={"rotate", "value_bits", "clip", "max_weight"}),
        "cases": [_as_json(result) for result in results],
    }
    conclude(report, targets(results), options.json)


def _as_json(result: Result) -> dict[str, Any]:
    runs = {"ours": result.ours, "flower": result.flower}
    return {
        **asdict(result),
        "medians": {name: asdict(medians(some)) for name, some in runs.items() if some},
    }


if __name__ == "__main__":
    main()
