"""What a version can be made of: anything that answers and that exports to ONNX.

Most models are networks. Others need only these two methods; see `minga.training.selection`.
"""

from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from minga.training.errors import TaskError
from minga.training.evaluate import predict
from minga.training.export import INPUT, OUTPUT, run_onnx, to_onnx
from minga.training.schema import text_categories
from minga.training.task import Task
from minga.training.texts import with_texts


class Model(Protocol):
    """A trained model, with all that prepares its inputs."""

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Give raw outputs, such as `Task.metrics` takes, for inputs of shape `(n, ...)`."""
        ...

    def to_onnx(self) -> bytes:
        """Give an ONNX model from `input`, shape `(batch, ...)`, to `output`."""
        ...


class NetworkModel:
    """A network.

    Args:
        network: from inputs of shape `(batch, ...)` to outputs of shape `(batch, ...)`.
        example: one or more inputs; only their shape and type matter.
    """

    def __init__(self, network: nn.Module, example: NDArray[Any]) -> None:
        self._network = network
        self._example = example[:1]

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Compute the network's outputs in evaluation mode."""
        return predict(self._network, inputs)

    def to_onnx(self) -> bytes:
        """Export the network.

        Raises:
            TaskError: it uses something that ONNX cannot express.
        """
        return to_onnx(self._network, self._example)


class ExportedModel:
    """A model of which only the export is left, such as a registered one that is no network."""

    def __init__(self, onnx_model: bytes) -> None:
        self._onnx = onnx_model

    def predict(self, inputs: NDArray[Any]) -> NDArray[Any]:
        """Compute with ONNX Runtime."""
        return run_onnx(self._onnx, inputs)

    def to_onnx(self) -> bytes:
        """Give the very same model."""
        return self._onnx


def exported(task: Task, model: Model) -> bytes:
    """Export a model and see that clients can ask it as they ask any other of the Task.

    A model that takes the numbers that stand for a Task's texts gets their translation.

    Raises:
        TaskError: it is no ONNX model, or has no `input` or `output`.
    """
    content = model.to_onnx()
    try:
        proto = onnx.load_from_string(content)
    except Exception as error:
        raise TaskError(f"the model's to_onnx gave no ONNX model: {error}") from error
    names = ([one.name for one in proto.graph.input], [one.name for one in proto.graph.output])
    if names != ([INPUT], [OUTPUT]):
        raise TaskError(
            f"the exported model takes {names[0]} and gives {names[1]}; it must take {INPUT!r} and "
            f"give {OUTPUT!r}, and nothing else"
        )
    texts = text_categories(task.columns, task.categories)
    if texts and proto.graph.input[0].type.tensor_type.elem_type == TensorProto.FLOAT:
        with_texts(proto, texts, len(task.columns))
        return bytes(proto.SerializeToString(deterministic=True))
    return content


def largest_gap(model: Model, onnx_outputs: NDArray[Any], inputs: NDArray[Any]) -> float:
    """Give the largest difference between a model's outputs and those of its export."""
    expected = model.predict(inputs)
    if expected.shape != onnx_outputs.shape:
        return float("inf")
    return float(np.max(np.abs(expected - onnx_outputs), initial=0.0))
