"""A network as an ONNX model: the same bytes for the same weights, computing the same.

The model takes `input`, float32 of shape `(batch, ...)`, and gives `output`. The network's
preparation is inside. A model of a table with categories that are texts takes text; see
`minga.training.texts`.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime
import torch
from google.protobuf.message import Message
from numpy.typing import NDArray
from torch import nn

from minga.training.errors import TaskError
from minga.training.preparation import table_of
from minga.training.texts import read_texts, texts_of, with_texts

INPUT = "input"
OUTPUT = "output"

MAX_BATCH = 1 << 20


def to_onnx(network: nn.Module, example: NDArray[Any]) -> bytes:
    """Export a network.

    Args:
        network: from inputs of shape `(batch, ...)` to outputs of shape `(batch, ...)`.
        example: one or more inputs; only their shape and type matter.

    Raises:
        TaskError: the network uses something that ONNX cannot express.
    """
    # A batch of 1 would be taken for a constant.
    inputs = torch.from_numpy(np.repeat(example[:1], 2, axis=0))
    was_training = network.training
    network.eval()
    try:
        program = _export(network, inputs)
    except Exception as error:
        # The exporter's own words are of its steps; what stopped it is the cause.
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise TaskError(
            f"the network does not export to ONNX: {reason}; "
            "keep the shapes in `forward` static except for the batch"
        ) from error
    finally:
        network.train(was_training)
    model = program.model_proto
    strip(model)
    table = table_of(network)
    if table is not None and table.texts:
        with_texts(model, table.texts, len(table.columns))
    return bytes(model.SerializeToString(deterministic=True))


def session(model: bytes) -> onnxruntime.InferenceSession:
    """Open an ONNX model as devices do: one thread, CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_onnx(
    model: bytes,
    inputs: NDArray[Any],
    *,
    batch: int = 4096,
    change: Callable[[NDArray[Any]], NDArray[Any]] | None = None,
) -> NDArray[Any]:
    """Give the ONNX model's outputs for inputs of shape `(n, ...)`, as the network takes them.

    Args:
        model: the ONNX file.
        inputs: in memory or on the disk.
        batch: how many are read and computed at once.
        change: what is made of each batch before, in order.
    """
    opened = session(model)
    parts = []
    for start in range(0, len(inputs), batch):
        rows = inputs[start : start + batch]
        rows = rows if change is None else change(rows)
        parts.append(opened.run([OUTPUT], {INPUT: as_served(opened, rows)})[0])
    return np.concatenate(parts)


def as_served(opened: onnxruntime.InferenceSession, inputs: NDArray[Any]) -> NDArray[Any]:
    """Give a network's inputs as its exported model takes them: as they are, or as text."""
    texts = read_texts(opened.get_modelmeta().custom_metadata_map)
    return inputs if texts is None else texts_of(inputs, texts)


def _export(network: nn.Module, inputs: torch.Tensor) -> Any:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            network,
            (inputs,),
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},),
        )


def strip(message: Message) -> None:
    """Drop stack traces and class paths, which differ between machines and tell on them."""
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if isinstance(value, Message) else value:
                strip(part)
