"""Networks as ONNX models."""

from collections import OrderedDict

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from minga.training.errors import TaskError
from minga.training.export import INPUT, OUTPUT, run_onnx, to_onnx
from minga.training.models import NetworkModel, largest_gap
from minga.training.network import build_network


def test_model_computes_what_the_network_does(blobs, splits):
    """The ONNX model has the preparation inside, takes any batch, and agrees with torch."""
    network = build_network(blobs, blobs.defaults, splits.train, seed=1)
    model = to_onnx(network, splits.test.inputs)
    outputs = run_onnx(model, splits.test.inputs, batch=64)
    assert (
        largest_gap(NetworkModel(network, splits.test.inputs), outputs, splits.test.inputs) < 1e-4
    )
    np.testing.assert_allclose(run_onnx(model, splits.test.inputs[:1]), outputs[:1], atol=1e-6)
    assert network.training


def test_same_weights_give_the_same_bytes(blobs, splits):
    """Exporting twice gives identical files, without a path or a stack trace of this machine."""
    models = [
        to_onnx(build_network(blobs, blobs.defaults, splits.train, seed=1), splits.test.inputs)
        for _ in range(2)
    ]
    assert models[0] == models[1]
    assert b"site-packages" not in models[0]
    assert str(torch.__file__).encode() not in models[0]


def test_names_are_those_of_the_contract(blobs, splits):
    """Whatever the network, its input is `input` and its output `output`, of any batch size."""
    network = build_network(blobs, blobs.defaults, splits.train, seed=1)
    graph = onnx.load_from_string(to_onnx(network, splits.test.inputs)).graph
    assert [value.name for value in (*graph.input, *graph.output)] == [INPUT, OUTPUT]
    batch = graph.input[0].type.tensor_type.shape.dim[0]
    assert batch.dim_param
    assert not batch.dim_value


def test_convolution_with_normalisation_agrees():
    """Layers that the exporter folds into each other still compute the same."""
    images = np.random.default_rng(0).normal(size=(50, 1, 8, 8)).astype(np.float32)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    )
    network = nn.Sequential(OrderedDict(preparation=nn.Identity(), model=model))
    assert (
        largest_gap(
            NetworkModel(network, images), run_onnx(to_onnx(network, images), images), images
        )
        < 1e-4
    )


def test_inexpressible_network_is_explained():
    """A network that depends on its data cannot be exported, and the message says so."""

    class Undecided(nn.Module):
        def forward(self, input):  # noqa: A002 - the exported name
            return input if input.sum() > 0 else -input

    with pytest.raises(TaskError, match="does not export to ONNX"):
        to_onnx(Undecided(), np.zeros((2, 3), np.float32))
