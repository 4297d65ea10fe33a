"""The networks that the benchmarks of serving ask: dense layers of random weights, in ONNX.

Each carries a reference of its inputs and outputs, as what `minga run` trains does, so that the
monitor has something to compare with; a server that knows nothing of it leaves it alone.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from minga.inference.monitor.reference import METADATA_KEY
from minga.training.profile import profile_columns

NUM_ROWS: Final = 2000
"""Rows that a network's reference describes."""


def network(widths: Sequence[int]) -> bytes:
    """Build a network with ReLU between its layers, from `input` to `output`.

    Args:
        widths: of its input, of each layer, and of its output.
    """
    generator = np.random.default_rng(1)
    inputs = values = generator.normal(size=(NUM_ROWS, widths[0])).astype(np.float32)
    nodes, weights, last = [], [], "input"
    for layer, (wide, narrow) in enumerate(pairwise(widths)):
        matrix = generator.normal(0, wide**-0.5, (wide, narrow)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        is_last = layer == len(widths) - 2
        product = "output" if is_last else f"product{layer}"
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [product]))
        values = values @ matrix
        if not is_last:
            last = f"hidden{layer}"
            nodes.append(helper.make_node("Relu", [product], [last]))
            values = np.maximum(values, 0)
    infos = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("input", widths[0]), ("output", widths[-1]))
    ]
    graph = helper.make_graph(nodes, "network", infos[:1], infos[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {METADATA_KEY: json.dumps(_reference(inputs, values))})
    content: bytes = model.SerializeToString()
    return content


def _reference(inputs: np.ndarray, outputs: np.ndarray) -> dict[str, Any]:
    """Describe inputs and outputs as training does."""
    columns = [
        {
            "role": role,
            "name": profile.name,
            "edges": profile.edges,
            "shares": profile.shares,
            "num_examples": NUM_ROWS,
            "mean": profile.mean,
            "deviation": profile.deviation,
        }
        for role, table in (("input", inputs), ("output", outputs))
        for profile in profile_columns(table)
    ]
    outliers = {"threshold": 1.3, "share": 0.01}
    return {"layout": 1, "num_held_out": NUM_ROWS, "columns": columns, "outliers": outliers}
