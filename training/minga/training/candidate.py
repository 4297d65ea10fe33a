"""From a trained network to a candidate: export it, measure it, judge it."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from minga.training.config import GateConfig
from minga.training.evaluate import evaluate, measure
from minga.training.export import INPUT, OUTPUT, as_served, parity_error, run_onnx, session, to_onnx
from minga.training.gates import Difference, Evidence, GateReport, compare, judge
from minga.training.profile import Profile, profile_columns
from minga.training.schema import Schema
from minga.training.task import Split, Task

PARITY_EXAMPLES = 1000
LATENCY_CALLS = 300
WARM_UP_CALLS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Champion:
    """The version that a candidate is compared with."""

    version: int
    onnx: bytes
    schema: Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An exported network and the verdict on it."""

    onnx: bytes
    profile: Profile
    report: GateReport


def assess(
    task: Task,
    network: nn.Module,
    test: Split,
    *,
    schema: Schema,
    profile: Profile,
    champion: Champion | None,
    config: GateConfig,
    seed: int,
) -> Candidate:
    """Export a network and judge it on the test split.

    Args:
        task: says what is measured.
        network: trained.
        test: nobody learned from it.
        schema: of the candidate's training data.
        profile: of the candidate's training data; the outputs' profile is added to it.
        champion: what it must not be worse than, if there is one.
        config: the gates' limits.
        seed: of the bootstrap.
    """
    onnx = to_onnx(network, test.inputs)
    outputs = run_onnx(onnx, test.inputs)
    few = test.inputs[:PARITY_EXAMPLES]
    breaks = champion.schema.breaks(schema) if champion else ()
    evidence = Evidence(
        metrics=evaluate(task, network, test),
        slices=_slice_metrics(task, outputs, test),
        parity_error=parity_error(network, outputs[: len(few)], few),
        latency_ms=latency_ms(onnx, test.inputs),
        size_bytes=len(onnx),
        champion=champion.version if champion else None,
        difference=_difference(task, outputs, test, champion=champion, config=config, seed=seed)
        if champion and not breaks
        else None,
        schema_breaks=breaks,
    )
    return Candidate(
        onnx=onnx,
        profile=profile.model_copy(update={"outputs": profile_columns(outputs)}),
        report=judge(evidence, config, task.objective),
    )


def latency_ms(onnx: bytes, inputs: NDArray[Any]) -> float:
    """Give the 95th percentile of the time for one example, on one thread."""
    opened = session(onnx)
    one = as_served(opened, inputs[:1])
    times = []
    for _ in range(WARM_UP_CALLS + LATENCY_CALLS):
        start = time.perf_counter()
        opened.run([OUTPUT], {INPUT: one})
        times.append(time.perf_counter() - start)
    return float(np.quantile(times[WARM_UP_CALLS:], 0.95) * 1000)


def _slice_metrics(task: Task, outputs: NDArray[Any], test: Split) -> dict[str, float]:
    return {
        name: measure(task, outputs[mask], test.targets[mask])[task.objective.metric]
        for name, mask in task.slices(test).items()
        if mask.any()
    }


def _difference(
    task: Task,
    outputs: NDArray[Any],
    test: Split,
    *,
    champion: Champion,
    config: GateConfig,
    seed: int,
) -> Difference:
    others = run_onnx(champion.onnx, test.inputs)
    metric = task.objective.metric

    def measure_both(indices: NDArray[np.intp]) -> tuple[float, float]:
        targets = test.targets[indices]
        return (
            measure(task, outputs[indices], targets)[metric],
            measure(task, others[indices], targets)[metric],
        )

    return compare(measure_both, len(test), config, task.objective, seed=seed)
