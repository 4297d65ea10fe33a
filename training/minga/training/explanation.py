"""What a version goes by: over many rows, and for a single one.

Two methods. *Gradients*: integrated gradients (Sundararajan et al., ICML 2017) by captum, over the
network with its preparation; the shares of a row add up to its answer's distance from the
baseline's. *Occlusion*: `minga.inference.explaining`, over the ONNX model alone, where torch or
captum is absent. The baseline of both is the mean of the training data, from the reference profile.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minga.inference.engine import ModelRef, OnnxModel
from minga.inference.explaining import occlude
from minga.training.bundle import LINEAGE, MODEL, PROFILE, SCHEMA, Digests, read_parameters
from minga.training.document import Document
from minga.training.errors import TaskError
from minga.training.lineage import Lineage
from minga.training.profile import Profile
from minga.training.robustness import usual
from minga.training.schema import Schema
from minga.training.task import Split, Task
from minga.training.texts import numbers_of, texts_of

Method = Literal["gradients", "occlusion"]

STEPS = 64
"""Of the integral; the error that they leave is told in `completeness_gap`."""

BATCH_ROWS = 256


class Explanation(Document):
    """Shares of the inputs in the answers.

    `importance` is each column's mean absolute share over all rows; inputs that are no table have
    one column for all of their values.
    """

    method: Method
    columns: tuple[str, ...]
    importance: dict[str, float]
    rows: tuple[tuple[float, ...], ...]
    """A row's share of each column."""
    completeness_gap: float | None
    """How far a row's shares are from adding up, at most; only of gradients."""


def can_use_gradients() -> bool:
    """Tell whether torch and captum are installed."""
    return find_spec("torch") is not None and find_spec("captum") is not None


def explain_by_occlusion(bundle: Path, inputs: NDArray[Any]) -> Explanation:
    """Explain answers with a version's ONNX model; needs neither torch nor MLflow.

    Args:
        bundle: the version's folder.
        inputs: shape `(n, ...)`.

    Raises:
        BadRequestError: the rows do not fit the model.
    """
    model, texts = open_model(bundle), _texts(bundle)
    name, output = model.inputs[0].name, model.outputs[0].name

    def predict(rows: NDArray[Any]) -> NDArray[Any]:
        return model.run({name: texts_of(rows, texts) if texts else rows})[output]

    shares = occlude(predict, _numbers(inputs, texts), _baseline(bundle))
    return _explanation("occlusion", bundle, shares, None)


def explain_by_gradients(
    task: Task, train: Split, bundle: Path, inputs: NDArray[Any]
) -> Explanation:
    """Explain answers with a version's network; needs torch and captum.

    Args:
        task: builds the network.
        train: its preparation is fitted on.
        bundle: the version's folder.
        inputs: floats of shape `(n, ...)`.

    Raises:
        TaskError: the inputs are whole numbers, along which there is no gradient.
    """
    import torch
    from captum.attr import IntegratedGradients

    from minga.training.network import build_network, load_parameters, one_thread

    inputs = _numbers(inputs, _texts(bundle))
    if inputs.dtype.kind != "f":
        raise TaskError(
            f"inputs of {inputs.dtype} have no gradient; explain them with --method occlusion"
        )
    lineage = Lineage.read(bundle / LINEAGE)
    network = build_network(task, lineage.params, train, seed=lineage.seed)
    load_parameters(network, read_parameters(bundle))
    network.eval()
    base = np.broadcast_to(_baseline(bundle), inputs.shape[1:]).astype(inputs.dtype)
    explainer, shares, gaps = IntegratedGradients(network), [], []
    with one_thread():
        for start in range(0, len(inputs), BATCH_ROWS):
            rows = torch.from_numpy(inputs[start : start + BATCH_ROWS].copy())
            with torch.no_grad():
                outputs = network(rows)
            part, gap = explainer.attribute(
                rows,
                baselines=torch.from_numpy(base.copy())[None].expand_as(rows),
                target=outputs.argmax(dim=1) if outputs.ndim > 1 else None,
                n_steps=STEPS,
                return_convergence_delta=True,
            )
            shares.append(part.detach().numpy())
            gaps.append(float(gap.abs().max()))
    return _explanation("gradients", bundle, np.concatenate(shares), max(gaps))


def open_model(bundle: Path) -> OnnxModel:
    """Load a bundle's ONNX model on its own."""
    digest = Digests.of(bundle).onnx
    name = Lineage.read(bundle / LINEAGE).task
    return OnnxModel.load(
        ModelRef(name=name, version="bundle", path=str(bundle / MODEL), sha256=digest)
    )


def _texts(bundle: Path) -> dict[int, tuple[str, ...]]:
    """Give the places of columns that hold text -> the texts that their numbers stand for."""
    columns = Schema.read(bundle / SCHEMA).columns
    return {place: column.names for place, column in enumerate(columns) if column.names}


def _numbers(inputs: NDArray[Any], texts: dict[int, tuple[str, ...]]) -> NDArray[Any]:
    """Give rows as numbers, if they are texts as clients send them.

    Raises:
        TaskError: a cell of a column of numbers is none.
    """
    if inputs.dtype.kind not in "OSU":
        return inputs
    try:
        return numbers_of(inputs, texts)
    except ValueError as error:
        raise TaskError(f"a cell of a column of numbers is none: {error}") from error


def _baseline(bundle: Path) -> NDArray[np.float64]:
    """Give the mean of the training data: of each column, or one number for what is no table.

    Between texts there is no mean: of a column that holds them it is the most frequent one.
    """
    schema, profile = Schema.read(bundle / SCHEMA), Profile.read(bundle / PROFILE)
    means = [
        usual(column.categories, seen.shares, seen.mean) if column.names else seen.mean
        for column, seen in zip(schema.columns, profile.inputs, strict=True)
    ]
    return np.asarray(means if len(schema.input_shape) == 1 else means[0])


def _explanation(
    method: Method, bundle: Path, shares: NDArray[Any], gap: float | None
) -> Explanation:
    schema = Schema.read(bundle / SCHEMA)
    names = tuple(column.name for column in schema.columns)
    table = shares.reshape(len(shares), -1)
    if len(names) != table.shape[1]:  # an image: its rows are explained value by value
        importance = {"values": float(np.abs(table).mean())}
        names = tuple(str(index) for index in range(table.shape[1]))
    else:
        means = np.abs(table).mean(axis=0)
        order = np.argsort(-means, kind="stable")
        importance = {names[index]: float(means[index]) for index in order}
    return Explanation(
        method=method,
        columns=names,
        importance=importance,
        rows=tuple(tuple(map(float, row)) for row in table),
        completeness_gap=gap,
    )
