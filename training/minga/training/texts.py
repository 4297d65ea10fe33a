"""Models that take a table's cells as they stand in it: texts.

A Task whose categories are texts learns from their places among the declared values. Its exported
model does that translation itself: it takes `input` as text of shape `(batch, columns)`, numbers
written out, an empty cell for a missing value. So nobody who asks the model needs the list of
categories, and nobody can have another one.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # a device that explains answers has no onnx
    import onnx

TEXTS = "minga.texts"
"""Key, in the model's metadata, of place of a column -> its texts."""

NUMBERS = "numbers"
UNKNOWN = -1.0


def with_texts(
    model: "onnx.ModelProto", texts: Mapping[int, Sequence[str]], num_columns: int
) -> None:
    """Put the translation of texts before a model that takes numbers of shape `(batch, columns)`.

    Args:
        model: is changed in place; its only input stays the first.
        texts: place of a column -> its categories, in their order.
        num_columns: of the table.
    """
    from onnx import TensorProto, helper

    graph = model.graph
    given = graph.input[0]
    name, batch = given.name, given.type.tensor_type.shape.dim[0].dim_param
    for node in graph.node:
        for index, wanted in enumerate(node.input):
            if wanted == name:
                node.input[index] = NUMBERS
    nodes = [
        node for place in range(num_columns) for node in _column(name, place, texts.get(place))
    ]
    nodes.append(helper.make_node("Concat", _names(num_columns), [NUMBERS], axis=1))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    constants = {"minga_empty": [""], "minga_nan": ["nan"]}
    for constant, value in constants.items():
        graph.initializer.append(helper.make_tensor(constant, TensorProto.STRING, [1], value))
    for place in range(num_columns):
        index = helper.make_tensor(f"minga_place_{place}", TensorProto.INT64, [1], [place])
        graph.initializer.append(index)
    given.CopyFrom(helper.make_tensor_value_info(name, TensorProto.STRING, [batch, num_columns]))
    if not any(opset.domain == "ai.onnx.ml" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    content = json.dumps({str(place): list(values) for place, values in sorted(texts.items())})
    helper.set_model_props(model, {TEXTS: content})


def texts_of(inputs: NDArray[Any], texts: Mapping[int, Sequence[str]]) -> NDArray[np.object_]:
    """Write numbers of shape `(n, columns)` as the texts that they stand for; NaN is empty."""
    written = np.empty(inputs.shape, object)
    for place in range(inputs.shape[1]):
        known = texts.get(place)
        for row, value in enumerate(inputs[:, place].tolist()):
            written[row, place] = _written(value, known)
    return written


def numbers_of(cells: NDArray[Any], texts: Mapping[int, Sequence[str]]) -> NDArray[np.float32]:
    """Read texts of shape `(n, columns)` as the numbers that they stand for, as the model does.

    Raises:
        ValueError: a cell of a column of numbers is none.
    """
    numbers = np.empty(cells.shape, np.float32)
    for place in range(cells.shape[1]):
        known = texts.get(place)
        for row, cell in enumerate(cells[:, place].tolist()):
            text = cell.decode() if isinstance(cell, bytes) else str(cell)
            if text == "":
                numbers[row, place] = np.nan
            elif known is None:
                numbers[row, place] = float(text)
            else:
                numbers[row, place] = known.index(text) if text in known else UNKNOWN
    return numbers


def read_texts(metadata: Mapping[str, str]) -> dict[int, tuple[str, ...]] | None:
    """Read place -> texts from a model's metadata; None if it takes numbers."""
    if TEXTS not in metadata:
        return None
    return {int(place): tuple(values) for place, values in json.loads(metadata[TEXTS]).items()}


def _written(value: float, known: Sequence[str] | None) -> str:
    if value != value:  # noqa: PLR0124 - NaN alone differs from itself
        return ""
    if known is None:
        return repr(value)
    return known[int(value)] if 0 <= value < len(known) else "?"


def _column(name: str, place: int, texts: Sequence[str] | None) -> "list[onnx.NodeProto]":
    """Translate one column, shape `(batch, 1)`.

    A number is read as float64 and then rounded to float32, as it is when training reads a table:
    rounding the text once would give another bit now and then.
    """
    from onnx import TensorProto, helper

    cell, out = f"minga_cell_{place}", _names(place + 1)[-1]
    nodes = [helper.make_node("Gather", [name, f"minga_place_{place}"], [cell], axis=1)]
    if texts is not None:
        encoder = helper.make_node(
            "LabelEncoder",
            [cell],
            [out],
            domain="ai.onnx.ml",
            keys_strings=[*texts, ""],
            values_floats=[*map(float, range(len(texts))), float("nan")],
            default_float=UNKNOWN,
        )
        return [*nodes, encoder]
    part = f"minga_{place}"
    return [
        *nodes,
        helper.make_node("Equal", [cell, "minga_empty"], [f"{part}_is_empty"]),
        helper.make_node("Where", [f"{part}_is_empty", "minga_nan", cell], [f"{part}_text"]),
        helper.make_node("Cast", [f"{part}_text"], [f"{part}_double"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", [f"{part}_double"], [out], to=TensorProto.FLOAT),
    ]


def _names(num_columns: int) -> list[str]:
    return [f"minga_column_{place}" for place in range(num_columns)]
