"""What one round costs on the wire, and what it is worth: bytes by codec, with the accuracy.

Devices learn to read digits by federated averaging, 50 rounds, from five seeds. Only the way in
which updates travel differs: the same devices train on the same batches. Updates go through the
product's own encoding; masks are left out here, since they cancel exactly and change no size.

A packed update is what a secure round sends; plain float32, zstd and top-k show the coordinator
each update. Control messages of a secure round are measured on a real one.
"""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the matrices are tiny

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from harness import (
    ROOT,
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    print_conditions,
    print_table,
)
from learning import (
    Problem,
    Vector,
    accuracy,
    draw_cohort,
    first_model,
    small_digits,
    train,
    writers,
)
from rivals.secagg_work import Case
from secagg import Fleet, Round

from minga.federation import wire
from minga.federation.config import FederationConfig
from minga.federation.secagg.fixedpoint import decode_sum, encode_update
from minga.federation.secagg.packing import add_packed, pack
from minga.federation.secagg.plan import ROUND_ID_BYTES, RoundPlan
from minga.federation.secagg.sizing import choose_neighbourhood
from minga.federation.v1 import federation_pb2 as pb

DEFAULTS: Final = FederationConfig()
DATA: Final = ROOT.parent / "shared" / "data"
NUM_SEEDS: Final = 5
NUM_ROUNDS: Final = 50
ZSTD_LEVEL: Final = 3
BASE: Final = "float32"
DEFAULT: Final = "packed, rotated (default)"

Codec = Callable[[Sequence[Vector], Sequence[int], int], tuple[Vector, int]]
"""Updates, weights, number of the round -> their mean, and the bytes that all of them took."""


# -- codecs --


def plain(deltas: Sequence[Vector], weights: Sequence[int], _number: int) -> tuple[Vector, int]:
    """Send float32 values."""
    return _mean(deltas, weights), sum(delta.nbytes for delta in deltas)


def zstd(deltas: Sequence[Vector], weights: Sequence[int], _number: int) -> tuple[Vector, int]:
    """Send float32 values, compressed."""
    codec = pa.Codec("zstd", compression_level=ZSTD_LEVEL)
    return _mean(deltas, weights), sum(len(codec.compress(delta.data)) for delta in deltas)


def top_k(share: float) -> Codec:
    """Send the largest values with their places (Aji and Heafield, EMNLP 2017).

    What is left out is lost: a device that is drawn now and then has nobody to keep it for.
    """

    def send(deltas: Sequence[Vector], weights: Sequence[int], _number: int) -> tuple[Vector, int]:
        kept = max(1, round(share * deltas[0].size))
        sparse = []
        for delta in deltas:
            places = np.argpartition(np.abs(delta), -kept)[-kept:]
            rest = np.zeros_like(delta)
            rest[places] = delta[places]
            sparse.append(rest)
        place_bits = (deltas[0].size - 1).bit_length()
        size = -(-kept * (32 + place_bits) // 8)
        return _mean(sparse, weights), len(deltas) * size

    return send


def packed(problem: Problem, **numbers: Any) -> Codec:
    """Send what a secure round sends, in the numbers given and the defaults for the others."""

    def send(deltas: Sequence[Vector], weights: Sequence[int], number: int) -> tuple[Vector, int]:
        plan = make_plan(problem.num_values, problem.cohort, number, **numbers)
        levels, size = np.zeros(plan.vector_length, np.uint32), 0
        for delta, weight in zip(deltas, weights, strict=True):
            capped = min(weight, plan.max_weight)
            upload = pack(encode_update(plan, delta, capped, os.urandom), plan.ring_bits)
            add_packed(levels, upload, plan.ring_bits)
            size += len(upload)
        return decode_sum(plan, levels, len(deltas))[0], size

    return send


def make_plan(num_values: int, cohort: int, number: int = 0, **numbers: Any) -> RoundPlan:
    """Make the plan of a round."""
    neighbourhood = choose_neighbourhood(cohort, DEFAULTS.expected_dropout, DEFAULTS.colluder_share)
    chosen = {
        "value_bits": DEFAULTS.value_bits,
        "clip": DEFAULTS.clip,
        "max_weight": DEFAULTS.max_weight,
        "rotate": DEFAULTS.rotate,
        **numbers,
    }
    return RoundPlan(
        round_id=number.to_bytes(ROUND_ID_BYTES),
        context_digest=bytes(32),
        num_values=num_values,
        max_cohort=cohort,
        num_neighbours=neighbourhood.num_neighbours,
        threshold=neighbourhood.threshold,
        **chosen,
    )


def _mean(deltas: Sequence[Vector], weights: Sequence[int]) -> Vector:
    return np.average(deltas, axis=0, weights=weights).astype(np.float32)


def make_codecs(problem: Problem) -> dict[str, Codec]:
    """Give the codecs that are compared.

    Eight bits are tuned to the problem: its largest value of an update is about 0.13 among writers,
    40 times the root mean square. The rotation lets the range be a fifth of that.
    """
    eight = {"value_bits": 8, "max_weight": 127}
    return {
        BASE: plain,
        "float32, zstd": zstd,
        "packed": packed(problem, rotate=False),
        DEFAULT: packed(problem),
        "packed, 8 bits": packed(problem, rotate=False, clip=0.15, **eight),
        "packed, 8 bits, rotated": packed(problem, rotate=True, clip=0.03, **eight),
        "top 10 %": top_k(0.1),
        "top 1 %": top_k(0.01),
    }


# -- learning --


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """What one codec brought from one seed."""

    accuracy: float
    upload_bytes: float
    """Of one device in one round."""
    relative_error: float
    """Squared error of a round's mean over its squared length, the mean over all rounds."""


def learn(problem: Problem, codec: Codec, seed: int, num_rounds: int) -> Learned:
    """Train the fleet."""
    model, num_bytes, errors = first_model(problem, seed), 0, []
    for number in range(num_rounds):
        cohort = draw_cohort(problem, seed, number)
        deltas = [train(problem, model, site, seed, number) for site in cohort]
        weights = [len(problem.sites[site].labels) for site in cohort]
        mean, size = codec(deltas, weights, number)
        exact = _mean(deltas, weights)
        errors.append(float(np.square(mean - exact).sum() / np.square(exact).sum()))
        num_bytes += size
        model = model + mean
    return Learned(
        accuracy=accuracy(problem, model),
        upload_bytes=num_bytes / num_rounds / problem.cohort,
        relative_error=statistics.fmean(errors),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one codec brought from all seeds."""

    codec: str
    runs: tuple[Learned, ...]

    def mean(self, name: str) -> float:
        """Give the mean of a figure."""
        return statistics.fmean(getattr(run, name) for run in self.runs)

    @property
    def accuracies(self) -> list[float]:
        """Give the accuracy from each seed."""
        return [run.accuracy for run in self.runs]


def measure(problem: Problem, num_rounds: int) -> list[Result]:
    """Run every codec from every seed."""
    codecs = make_codecs(problem)
    runs: dict[str, list[Learned]] = {name: [] for name in codecs}
    for seed in range(NUM_SEEDS):
        for name, codec in codecs.items():
            runs[name].append(learn(problem, codec, seed, num_rounds))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [Result(codec=name, runs=tuple(some)) for name, some in runs.items()]


# -- what else a secure round sends --


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Bytes of one device's control messages in one secure round, as protobuf."""

    up: float
    down: float


def control_bytes(cohort: int) -> Control:
    """Take a real round without losses, and count what devices send and get beside the bulk."""
    plan = make_plan(100, cohort)
    case = Case(
        num_values=plan.num_values,
        num_devices=cohort,
        num_lost=0,
        num_neighbours=plan.num_neighbours,
        threshold=plan.threshold,
    )
    with tempfile.TemporaryDirectory() as folder:
        round_ = Round(Fleet(Path(folder), cohort), case)
        round_.run()
    name = round_.plan.round_id.hex()
    up = down = 0
    for device in round_.sessions:
        peers = round_.graph[device]
        advert = wire.advert_to_wire(name, round_.adverts[device])
        shares = wire.shares_to_wire(name, round_.shares[device].values())
        reveal = wire.reveal_to_wire(name, round_.reveals[device])
        adverts = [wire.advert_to_wire(name, round_.adverts[peer]) for peer in peers]
        inbox = [wire.share_to_wire(round_.shares[peer][device]) for peer in peers]
        signed = pb.SurvivorConfirmation(round_id=name, device_id=device, signature=bytes(71))
        update = pb.MaskedUpdate(round_id=name, digest=bytes(32), size=1 << 20)
        sent = (advert, shares, update, signed, reveal)
        got = (
            pb.RoundInvite(round_id=name, plan=wire.plan_to_wire(plan), model_digest=bytes(32)),
            pb.NeighbourKeys(round_id=name, adverts=adverts),
            pb.NeighbourShares(round_id=name, shares=inbox),
            pb.Survivors(round_id=name, device_ids=round_.survivors),
            pb.Confirmations(round_id=name, confirmations=[signed] * len(peers)),
        )
        up += sum(message.ByteSize() for message in sent)
        down += sum(message.ByteSize() for message in got)
    return Control(up=up / cohort, down=down / cohort)


# -- what came out --

LEGEND: Final = """\
bytes/value: one device's upload in one round over the model's values; with control: and what else
the device sends; error: squared error of a round's mean over its squared length; difference: of the
mean accuracy from float32's, in brackets in standard deviations of float32 over the seeds."""


def print_results(
    problem: Problem, results: Sequence[Result], control: Control, num_rounds: int
) -> None:
    """Print a row for each codec."""
    base = results[0]
    rows = []
    for result in results:
        size = result.mean("upload_bytes")
        is_secure = result.codec.startswith("packed")
        with_control = size + (control.up if is_secure else 0)
        loss = result.mean("accuracy") - base.mean("accuracy")
        deviations = f"{loss / statistics.stdev(base.accuracies):+.1f}"
        rows.append(
            [
                result.codec,
                "yes" if is_secure else "no",
                f"{size / problem.num_values:.2f}",
                f"{with_control / problem.num_values:.2f}",
                f"{with_control / base.mean('upload_bytes'):.2f}",
                f"{result.mean('relative_error'):.1e}",
                f"{result.mean('accuracy'):.4f} ± {statistics.stdev(result.accuracies):.4f}",
                "" if result is base else f"{loss:+.4f} ({deviations})",
            ]
        )
    columns = ("codec", "secure", "bytes/value", "with control", "to float32", "error")
    print_table(
        f"{problem.name}: {problem.num_values:,} values, {len(problem.sites)} devices, "
        f"{problem.cohort} a round, {num_rounds} rounds, {len(base.runs)} seeds",
        (*columns, "accuracy", "difference"),
        rows,
    )
    print(LEGEND)
    print(
        f"Every codec gets the model as float32 ({4 * problem.num_values:,} bytes a device); a "
        f"secure round's control messages are {control.up:,.0f} bytes up and {control.down:,.0f} "
        "down a device, whatever the model."
    )


def targets(problem: Problem, results: Sequence[Result], control: Control) -> list[Target]:
    """Compare the default with float32, and its size in larger cohorts with what is asked for."""
    base = results[0]
    ours = next(result for result in results if result.codec == DEFAULT)
    loss = base.mean("accuracy") - ours.mean("accuracy")
    sizes = [
        Target(
            name=f"bandwidth.default_bytes_a_value_{cohort}_devices",
            value=round(make_plan(1_000_000, cohort).upload_size / 1_000_000, 2),
            goal="<=3",
        )
        for cohort in (8, 32, 64)
    ]
    return [
        Target(
            name="bandwidth.default_upload_to_float32",
            value=(ours.mean("upload_bytes") + control.up) / (4 * problem.num_values),
            goal="<=1",
        ),
        Target(
            name="bandwidth.default_accuracy_loss_in_seed_deviations",
            value=loss / statistics.stdev(base.accuracies),
            goal="<=1",
        ),
        *sizes,
    ]


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--data", type=Path, default=DATA, metavar="FOLDER", help="where mnist_train_0.npz lies"
    )
    options = parser.parse_args()
    num_rounds = NUM_ROUNDS
    under = conditions(["numpy", "pyarrow", "scikit-learn"])
    if options.quick:
        problem = small_digits()
    else:
        try:
            problem = writers(options.data)
        except FileNotFoundError as error:
            print(
                f"skipped: no digits of writers ({error.filename} is missing); name their folder "
                "with --data, or take --quick"
            )
            return
    with ending_cleanly():
        print_conditions(under)
        control = control_bytes(problem.cohort)
        results = measure(problem, num_rounds)
    print_results(problem, results, control, num_rounds)
    report = {
        "benchmark": "bandwidth",
        "quick": options.quick,
        "conditions": under,
        "problem": {
            "name": problem.name,
            "num_values": problem.num_values,
            "num_devices": len(problem.sites),
            "cohort": problem.cohort,
            "num_rounds": num_rounds,
        },
        "control": asdict(control),
        "codecs": [asdict(result) for result in results],
    }
    conclude(report, targets(problem, results, control), options.json)


if __name__ == "__main__":
    main()
