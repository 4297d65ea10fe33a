"""A model whose answers are right by construction, with the reference that training gives it."""

import functools
import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from minga.inference.monitor.reference import METADATA_KEY, Reference
from minga.training import Maximize, Split, Splits, Task
from minga.training.data import profile_of
from minga.training.reference import describe
from minga.training.schema import infer_schema

WEIGHTS = np.array([1.5, -1.0, 0.5, 0.0], np.float32)
NUM_TRAIN, NUM_TEST = 4000, 3000


def rows(num_rows: int, seed: int, *, shift: float = 0.0) -> np.ndarray:
    """Draw three numbers, of which the first may be shifted, and one of three categories."""
    generator = np.random.default_rng(seed)
    table = generator.normal(size=(num_rows, 4))
    table[:, 0] += shift
    table[:, 3] = generator.choice([0, 1, 2], num_rows, p=[0.5, 0.3, 0.2])
    return table.astype(np.float32)


def logits(inputs: np.ndarray) -> np.ndarray:
    """Compute what the model answers, shape `(n,)`."""
    return inputs @ WEIGHTS


def truths(inputs: np.ndarray, seed: int) -> np.ndarray:
    """Draw the right answers, with the very probabilities that the model gives."""
    chances = 1 / (1 + np.exp(-logits(inputs)))
    return (np.random.default_rng(seed).random(len(inputs)) < chances).astype(np.float32)


class YesOrNo(Task):
    """Answers with a logit."""

    name = "yes-or-no"
    columns = ("first", "second", "third", "kind")
    objective = Maximize("accuracy")

    def data(self, source):
        train, test = rows(NUM_TRAIN, 1), rows(NUM_TEST, 2)
        learned = Split(inputs=train, targets=truths(train, 3))
        judged = Split(inputs=test, targets=truths(test, 4))
        return Splits(train=learned, validation=judged, test=judged)

    def model(self, params):
        raise NotImplementedError

    def loss(self, outputs, targets):
        raise NotImplementedError

    def metrics(self, outputs, targets):
        return {"accuracy": float(np.mean((outputs > 0) == (targets > 0.5)))}

    def probabilities(self, outputs):
        return 1 / (1 + np.exp(-outputs))


@functools.cache
def reference() -> Reference:
    """Give the reference as training writes it."""
    task = YesOrNo()
    splits = task.data("")
    schema = infer_schema(splits.train, task.columns)
    given = describe(
        task,
        schema=schema,
        profile=profile_of(task, splits.train),
        test=splits.test,
        outputs=logits(splits.test.inputs),
    )
    return Reference.parse(json.dumps(given))


@functools.cache
def watched_model() -> bytes:
    """Serialise the model with its reference inside."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "weights"], ["output"])],
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(WEIGHTS, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {METADATA_KEY: reference().text})
    onnx.checker.check_model(model)
    return model.SerializeToString()
