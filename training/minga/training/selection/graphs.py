"""Scikit-learn's trees behind a network's preparation, as one ONNX model.

The preparation is the Task's own, exported as it is for a network. So what is no network prepares
inputs as networks do, texts and missing values included, and takes the same input.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import nn

from minga.training.architectures import Floats
from minga.training.export import OUTPUT, strip, to_onnx

PREPARED = "prepared"
SCORES = "scores"
"""What the trees give, shape `(batch, k)`."""

ML_OPSET = 3
"""Version of the operators for trees; ONNX Runtime has them in float32 from 1 on."""

ROWS = "minga_rows"


def prepared_by(preparation: nn.Module) -> nn.Module:
    """Make a network of a preparation alone: from inputs to rows of floats."""
    return nn.Sequential(OrderedDict(preparation=preparation, rows=Floats()))


@dataclass(frozen=True, slots=True)
class Part:
    """What follows a preparation: nodes from `ROWS` to `output`, and the constants they need."""

    nodes: Sequence[onnx.NodeProto]
    constants: Sequence[onnx.TensorProto]


def behind(
    preparation: nn.Module,
    example: NDArray[Any],
    make: Callable[[int, int], Part],
    *,
    shape: tuple[int, ...],
) -> bytes:
    """Write preparation, trees and what follows them as one model.

    Args:
        preparation: as `prepared_by` gives it.
        example: one or more inputs.
        make: from the width of prepared rows and the version of ONNX's operators to the rest.
        shape: of one output.
    """
    model = onnx.load_from_string(to_onnx(preparation, example))
    version = next(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    graph = model.graph
    rest = make(graph.output[0].type.tensor_type.shape.dim[1].dim_value, version)
    _rename(graph, {OUTPUT: ROWS})
    batch = graph.input[0].type.tensor_type.shape.dim[0].dim_param or "batch"
    graph.node.extend(rest.nodes)
    graph.initializer.extend(rest.constants)
    del graph.output[:]
    del graph.value_info[:]
    graph.output.append(helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [batch, *shape]))
    if not any(one.domain == "ai.onnx.ml" for one in model.opset_import):
        model.opset_import.append(helper.make_opsetid("ai.onnx.ml", ML_OPSET))
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def exact_thresholds(thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Round thresholds to the float32 below, so that no float32 changes its side.

    Exported thresholds are float32. Rounding to the nearest would send values that lie between a
    threshold and its rounding the other way.
    """
    rounded = thresholds.astype(np.float32)
    below = np.nextafter(rounded, np.float32(-np.inf))
    return np.where(rounded > thresholds, below, rounded).astype(np.float64)


def converted(
    estimator: Any, width: int, version: int, *, options: dict[str, Any], scores: str
) -> Part:
    """Convert an estimator of scikit-learn, from `ROWS` to `SCORES`.

    Args:
        estimator: fitted on prepared rows; of a kind that skl2onnx converts.
        width: of these.
        version: of ONNX's operators.
        options: of the conversion.
        scores: the name that skl2onnx gives the scores.
    """
    from skl2onnx import convert_sklearn
    from skl2onnx.common.data_types import FloatTensorType

    trees = convert_sklearn(
        estimator,
        name="trees",  # else a random one
        initial_types=[(PREPARED, FloatTensorType([None, width]))],
        options={id(estimator): options} if options else None,
        target_opset={"": version, "ai.onnx.ml": ML_OPSET},
    )
    strip(trees)
    _rename(trees.graph, {PREPARED: ROWS, scores: SCORES}, prefix="trees/")
    return Part(list(trees.graph.node), list(trees.graph.initializer))


def _rename(graph: onnx.GraphProto, names: dict[str, str], *, prefix: str = "") -> None:
    """Rename some values of a graph, and put a prefix before all others."""

    def new(name: str) -> str:
        return names.get(name, prefix + name) if name else name

    for node in graph.node:
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
        node.name = prefix + node.name
    for constant in graph.initializer:
        constant.name = new(constant.name)
