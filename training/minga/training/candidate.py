"""From a trained model to a candidate: export it, measure it, judge it."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from minga.training.calibration import Calibration, calibrate
from minga.training.config import GateConfig
from minga.training.evaluate import measure, measure_with_loss
from minga.training.export import INPUT, OUTPUT, as_served, run_onnx, session
from minga.training.fairness import Fairness, measure_fairness
from minga.training.gates import Difference, Evidence, GateReport, Trial, compare, judge
from minga.training.models import Model, NetworkModel, exported, largest_gap
from minga.training.profile import Profile, profile_columns
from minga.training.reference import with_reference
from minga.training.robustness import Disturb, gaps, noise
from minga.training.schema import Schema
from minga.training.stored import is_large, sample_places
from minga.training.task import Split, Task

PARITY_EXAMPLES = 1000
TRIAL_EXAMPLES = 16
LATENCY_CALLS = 300
WARM_UP_CALLS = 30

TryOut = Callable[[bytes, NDArray[Any], NDArray[Any]], tuple[Trial, ...]]
"""From an ONNX model, inputs as clients send them and the outputs that it must give for them, to
what the runtimes made of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Champion:
    """The version that a candidate is compared with."""

    version: int
    onnx: bytes
    schema: Schema


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An exported model and the verdict on it."""

    onnx: bytes
    profile: Profile
    report: GateReport


def assess(
    task: Task,
    trained: nn.Module | Model,
    test: Split,
    *,
    schema: Schema,
    profile: Profile,
    champion: Champion | None,
    config: GateConfig,
    seed: int,
    try_out: TryOut | None = None,
) -> Candidate:
    """Export a model and judge it on the test split.

    Args:
        task: says what is measured.
        trained: a network, or any other model.
        test: nobody learned from it.
        schema: of the candidate's training data.
        profile: of the candidate's training data; the outputs' profile is added to it.
        champion: what it must not be worse than, if there is one.
        config: the gates' limits.
        seed: of the bootstrap and of the disturbances.
        try_out: starts the runtimes that are to load the model; see `minga.cluster.runtimes`.
    """
    model = NetworkModel(trained, test.inputs) if isinstance(trained, nn.Module) else trained
    bare = exported(task, model)
    outputs = run_onnx(bare, test.inputs)
    onnx = with_reference(bare, task, schema=schema, profile=profile, test=test, outputs=outputs)
    few = test.inputs[:PARITY_EXAMPLES]
    breaks = champion.schema.breaks(schema) if champion else ()
    slices = {name: mask for name, mask in task.slices(test).items() if mask.any()}
    metrics = measure_with_loss(task, model.predict(test.inputs), test)
    evidence = Evidence(
        metrics=metrics,
        slices={
            name: measure(task, outputs[mask], test.targets[mask])[task.objective.metric]
            for name, mask in slices.items()
        },
        slice_sizes={name: int(mask.sum()) for name, mask in slices.items()},
        on_bad_days={
            name: (_under(task, onnx, disturb, test), limit)
            for name, disturb, limit in _bad_days(schema, profile, config=config, seed=seed)
        },
        calibration=_calibration(task, outputs, test),
        fairness=_fairness(task, outputs, test, config),
        parity_error=largest_gap(model, outputs[: len(few)], few),
        latency_ms=latency_ms(onnx, test.inputs),
        size_bytes=len(onnx),
        champion=champion.version if champion else None,
        difference=_difference(task, outputs, test, champion=champion, config=config, seed=seed)
        if champion and not breaks
        else None,
        schema_breaks=breaks,
        trials=try_out(
            onnx, as_served(session(onnx), test.inputs[:TRIAL_EXAMPLES]), outputs[:TRIAL_EXAMPLES]
        )
        if try_out
        else (),
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


def _bad_days(
    schema: Schema, profile: Profile, *, config: GateConfig, seed: int
) -> Iterator[tuple[str, Disturb, float]]:
    """Give what disturbs inputs, and how much worse the objective may be on them."""
    if config.noise > 0:
        disturb = noise(schema, profile, amount=config.noise, seed=seed)
        yield f"noise of {config.noise:g}", disturb, config.max_noise_loss
    if config.missing > 0:
        disturb = gaps(schema, profile, share=config.missing, seed=seed)
        yield f"{config.missing:.0%} of values missing", disturb, config.max_missing_loss


def _under(task: Task, onnx: bytes, disturb: Disturb, test: Split) -> float:
    """Give the objective's metric on disturbed inputs; not a number if an output is none."""
    outputs = run_onnx(onnx, test.inputs, change=disturb)
    if outputs.dtype.kind == "f" and not np.all(np.isfinite(outputs)):
        return float("nan")
    return measure(task, outputs, test.targets)[task.objective.metric]


def _calibration(task: Task, outputs: NDArray[Any], test: Split) -> Calibration | None:
    probabilities = task.probabilities(outputs)
    return None if probabilities is None else calibrate(probabilities, test.targets)


def _fairness(
    task: Task, outputs: NDArray[Any], test: Split, config: GateConfig
) -> tuple[Fairness, ...]:
    probabilities = task.probabilities(outputs)
    if probabilities is None:
        return ()
    return tuple(
        measure_fairness(
            attribute,
            groups,
            probabilities,
            test.targets,
            min_examples=config.min_slice_examples,
        )
        for attribute, groups in sorted(task.groups(test).items())
    )


def _difference(
    task: Task,
    outputs: NDArray[Any],
    test: Split,
    *,
    champion: Champion,
    config: GateConfig,
    seed: int,
) -> Difference:
    """Compare with the champion; by rows at equal distances if there are very many.

    An interval of `SAMPLE_ROWS` rows is narrow enough to judge by, and wider than one of all rows.
    """
    others, targets = run_onnx(champion.onnx, test.inputs), test.targets
    metric = task.objective.metric
    if is_large(test.inputs):
        places = sample_places(len(test))
        outputs, others, targets = outputs[places], others[places], targets[places]

    def measure_both(indices: NDArray[np.intp]) -> tuple[float, float]:
        return (
            measure(task, outputs[indices], targets[indices])[metric],
            measure(task, others[indices], targets[indices])[metric],
        )

    return compare(measure_both, len(targets), config, task.objective, seed=seed)
