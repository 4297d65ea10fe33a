"""Gives a model what its monitor compares traffic with; see `minga.inference.monitor.reference`.

It is put into the ONNX file's metadata, so that it goes wherever the model goes and the model's
digest vouches for it. It is made of the schema, the reference profile and what the model answered
on the test split: quantiles, ranges, shares and rates, never a row.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from minga.inference.monitor.reference import (
    LAYOUT,
    MAX_COLUMNS,
    METADATA_KEY,
    AnswerKind,
    Column,
    Role,
)
from minga.inference.monitor.sketch import loss_rows, outlier_lengths, scores_of
from minga.training.calibration import as_classes
from minga.training.losses import MAX_ROWS, grow_losses
from minga.training.profile import ColumnProfile, Profile, profile_columns
from minga.training.schema import Column as SchemaColumn
from minga.training.schema import Schema
from minga.training.stored import chunks_of
from minga.training.task import Split, Task

OUTLIER_SHARE = 0.01
"""Share of the test split's rows that are called outliers."""

NUM_SCORE_BINS = 10
"""Bins of the score for each answer; together with the other's up to twice as many."""

MIN_SCORES = 15
"""Fewest examples that a bin of the score is cut for."""

MAX_CLASSES = 100

Labels = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Answers:
    """How answers are judged, and the columns that this takes."""

    judged: dict[str, Any]
    columns: list[dict[str, Any]]


def with_reference(
    model: bytes,
    task: Task,
    *,
    schema: Schema,
    profile: Profile,
    test: Split,
    outputs: NDArray[Any],
) -> bytes:
    """Put a model's reference into its file, in the place of an older one; the rest stays.

    Args:
        model: the ONNX file.
        task: says what the outputs mean.
        schema: of the training data.
        profile: of the training data.
        test: nobody learned from it.
        outputs: the model's, for the test split.
    """
    loaded = onnx.load_from_string(model)
    others = {entry.key: entry.value for entry in loaded.metadata_props}
    given = describe(task, schema=schema, profile=profile, test=test, outputs=outputs)
    reference = json.dumps(given, allow_nan=False, separators=(",", ":"))
    onnx.helper.set_model_props(loaded, {**others, METADATA_KEY: reference})
    return bytes(loaded.SerializeToString(deterministic=True))


def without_reference(model: bytes) -> bytes:
    """Take a model's reference out of its file: what is left says what it computes.

    Args:
        model: the ONNX file; one without a reference gives the same.
    """
    loaded = onnx.load_from_string(model)
    kept = {e.key: e.value for e in loaded.metadata_props if e.key != METADATA_KEY}
    onnx.helper.set_model_props(loaded, kept)
    return bytes(loaded.SerializeToString(deterministic=True))


def describe(
    task: Task, *, schema: Schema, profile: Profile, test: Split, outputs: NDArray[Any]
) -> dict[str, Any]:
    """Give a model's reference as plain values; the arguments are those of `with_reference`."""
    inputs = [
        _input(column, described, profile.num_examples)
        for column, described in zip(profile.inputs, schema.columns, strict=True)
    ]
    given: dict[str, Any] = {
        "layout": LAYOUT,
        "num_held_out": len(test),
        "columns": [*inputs, *_outputs(task, outputs)],
    }
    outliers = _outliers(inputs, test.inputs)
    if outliers:
        given["outliers"] = outliers
    answers = _answers(task, schema, test, outputs)
    if answers:
        given["answers"] = answers.judged
        given["columns"] += answers.columns
        if answers.judged["kind"] is AnswerKind.NUMBER:
            given |= _losses(given["columns"], inputs, test, outputs)
    return given


def _input(profile: ColumnProfile, described: SchemaColumn, num_examples: int) -> dict[str, Any]:
    return {
        **_column(Role.INPUT, profile.name, profile, num_examples),
        "mean": profile.mean,
        "deviation": profile.deviation,
        "missing": profile.missing,
        "low": described.low,
        "high": described.high,
        "categories": described.categories,
        "names": described.names,
    }


def _outputs(task: Task, outputs: NDArray[Any]) -> list[dict[str, Any]]:
    profiles = profile_columns(outputs)
    names = (
        ["output"] if len(profiles) == 1 else [f"output {place}" for place in range(len(profiles))]
    )
    kinds: Sequence[str] = ["number"] * len(profiles)
    if len(task.outputs) == len(profiles):
        names, kinds = list(task.outputs), list(task.outputs.values())
    return [
        _numbered(name, outputs.reshape(len(outputs), -1)[:, place])
        if kinds[place] == "category"
        else _column(Role.OUTPUT, name, profiles[place], len(outputs))
        for place, name in enumerate(names)
    ]


def _numbered(name: str, values: NDArray[Any]) -> dict[str, Any]:
    """Describe an output that is one of 0, 1, 2 and so on, each of which has a bin.

    What is above all that the test split has is in a last bin of its own.
    """
    counts = np.bincount(values.round().astype(np.int64))
    return {
        "role": Role.OUTPUT,
        "name": name,
        "edges": [number + 0.5 for number in range(len(counts))],
        "shares": [*(counts / counts.sum()).tolist(), 0.0],
        "num_examples": len(values),
        "categories": list(map(float, range(len(counts)))),
    }


def _column(role: Role, name: str, profile: ColumnProfile, num_examples: int) -> dict[str, Any]:
    # A column without any value has one bin, which is as good as another.
    shares = profile.shares if sum(profile.shares) else (1.0,)
    return {
        "role": role,
        "name": name,
        "edges": profile.edges,
        "shares": shares,
        "num_examples": num_examples,
    }


def _outliers(inputs: list[dict[str, Any]], rows: NDArray[Any]) -> dict[str, float] | None:
    """Say how far from the middle a row is an outlier; None if there is nothing to measure by."""
    if rows.ndim != 2 or rows.shape[1] > MAX_COLUMNS:
        return None
    columns = [
        Column(
            role=Role.INPUT,
            name=given["name"],
            edges=(),
            shares=(1.0,),
            num_examples=1,
            mean=given["mean"],
            deviation=given["deviation"],
            categories=given["categories"],
        )
        for given in inputs
    ]
    lengths = np.concatenate(
        [outlier_lengths(columns, piece.T.astype(np.float64)) for piece in chunks_of(rows)]
    )
    if not lengths.any():
        return None
    threshold = float(np.quantile(lengths, 1 - OUTLIER_SHARE))
    return {"threshold": threshold, "share": float((lengths > threshold).mean())}


def _answers(task: Task, schema: Schema, test: Split, outputs: NDArray[Any]) -> _Answers | None:
    """Say how answers are judged; None if it is not known."""
    targets = np.asarray(test.targets).reshape(len(test), -1)
    table = outputs.reshape(len(outputs), -1)
    if targets.shape[1] != 1:
        return None
    probabilities = task.probabilities(outputs)
    if probabilities is None:
        is_class = any(column.kind == "category" for column in schema.targets)
        return None if is_class or table.shape[1] != 1 else _number(targets[:, 0], table[:, 0])
    classes = as_classes(probabilities)
    if table.shape[1] == 1 and classes.shape[1] == 2:
        return _yes_no(targets[:, 0] == 1, table[:, 0].astype(np.float64), classes[:, 1])
    if table.shape == classes.shape and np.array_equal(table.argmax(1), classes.argmax(1)):
        return _class(targets[:, 0], table)
    return None


def _number(targets: NDArray[Any], outputs: NDArray[Any]) -> _Answers:
    errors = np.abs(targets.astype(np.float64) - outputs)
    judged = {
        "kind": AnswerKind.NUMBER,
        "error": float(errors.mean()),
        "error_deviation": float(errors.std()),
    }
    return _Answers(judged, [])


def _losses(
    columns: list[dict[str, Any]], inputs: list[dict[str, Any]], test: Split, outputs: NDArray[Any]
) -> dict[str, Any]:
    """Say where errors of numbers are large, and in which bins that is counted; nothing if not."""
    if test.inputs.ndim != 2 or test.inputs.shape[1] > MAX_COLUMNS:
        return {}
    rows, answers = test.inputs[:MAX_ROWS].T.astype(np.float64), outputs[:MAX_ROWS]
    means = np.array([column["mean"] for column in inputs])
    errors = np.abs(test.targets[:MAX_ROWS].reshape(-1).astype(np.float64) - answers.reshape(-1))
    found = grow_losses(loss_rows(means, rows, answers), errors)
    if found is None:
        return {}
    edges = np.arange(0.5, len(found.shares) - 1, dtype=np.float64)
    score = _score_column(edges, found.shares, found.num_examples)
    return {"columns": [*columns, score], "losses": found.tree}


def _yes_no(
    is_yes: Labels, scores: NDArray[np.float64], probabilities: NDArray[np.float64]
) -> _Answers | None:
    order = np.argsort(scores, kind="stable")
    if np.any(np.diff(probabilities[order]) < -1e-6):
        return None  # a larger output does not mean a likelier yes
    chosen = probabilities >= 0.5
    edges = _score_edges(scores, is_yes)
    threshold = None
    if chosen.any() and not chosen.all():
        threshold = float((scores[chosen].min() + scores[~chosen].max()) / 2)
        edges = np.union1d(edges, [threshold])
    shares, rates = _rates(scores, is_yes, edges)
    if threshold is None:
        cut = 0 if chosen.all() else len(shares)
    else:
        cut = int(np.searchsorted(edges, threshold)) + 1
    judged = {"kind": AnswerKind.YES_NO, "rates": rates, "cut": cut}
    return _Answers(judged, [_score_column(edges, shares, len(scores))])


def _class(targets: NDArray[Any], outputs: NDArray[Any]) -> _Answers:
    scores, answers = scores_of(AnswerKind.CLASS, outputs)
    assert answers is not None, "a class was chosen"
    is_right = answers == targets
    edges = _score_edges(scores, is_right)
    shares, rates = _rates(scores, is_right, edges)
    columns = [_score_column(edges, shares, len(scores))]
    num_classes = outputs.shape[1]
    if num_classes <= MAX_CLASSES:
        counts = np.bincount(answers.astype(int), minlength=num_classes)
        columns.append(
            {
                "role": Role.ANSWER,
                "name": "class",
                "edges": [number + 0.5 for number in range(num_classes - 1)],
                "shares": (counts / counts.sum()).tolist(),
                "num_examples": len(scores),
                "categories": list(map(float, range(num_classes))),
            }
        )
    return _Answers({"kind": AnswerKind.CLASS, "rates": rates}, columns)


def _score_edges(scores: NDArray[np.float64], is_yes: Labels) -> NDArray[np.float64]:
    """Cut where the scores of either answer have their quantiles, so that a rare one has bins."""
    edges: list[float] = []
    for part in (scores[is_yes], scores[~is_yes]):
        num_bins = min(len(part) // MIN_SCORES, NUM_SCORE_BINS)
        if num_bins > 1:
            edges += np.quantile(part, np.linspace(0, 1, num_bins + 1)[1:-1]).tolist()
    return np.unique(edges)


def _rates(
    scores: NDArray[np.float64], is_yes: Labels, edges: NDArray[np.float64]
) -> tuple[list[float], list[float]]:
    """Give each bin's share of the scores, and its share of yes, made to rise with the score."""
    from sklearn.isotonic import IsotonicRegression

    places = np.searchsorted(edges, scores, side="right")
    counts = np.bincount(places, minlength=len(edges) + 1)
    yes = np.bincount(places, weights=is_yes, minlength=len(edges) + 1)
    filled = np.flatnonzero(counts)
    # Pool adjacent violators (M. Ayer et al., Annals of Mathematical Statistics 1955).
    regression = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip")
    regression.fit(filled, yes[filled] / counts[filled], sample_weight=counts[filled])
    rates = regression.predict(np.arange(len(counts)))
    return (counts / counts.sum()).tolist(), rates.tolist()


def _score_column(
    edges: NDArray[np.float64], shares: list[float], num_examples: int
) -> dict[str, Any]:
    return {
        "role": Role.SCORE,
        "name": "score",
        "edges": edges.tolist(),
        "shares": shares,
        "num_examples": num_examples,
    }
