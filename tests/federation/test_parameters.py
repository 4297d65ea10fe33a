"""Parameters as bytes, as a file, as a vector."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.numpy import save

from minga.federation.errors import MissingBlobError, PeerError
from minga.federation.memory import BLOCK_VALUES
from minga.federation.parameters import (
    Layout,
    ParameterFile,
    Parameters,
    from_bytes,
    read_layout,
    read_parameters,
    to_bytes,
)

TENSORS = arrays(
    np.float32,
    array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    elements=st.floats(-1e6, 1e6, width=32),
)
PARAMETERS = st.dictionaries(
    st.text("abcdefghij._", min_size=1, max_size=8), TENSORS, min_size=1, max_size=5
)


@given(parameters=PARAMETERS)
@settings(max_examples=50)
def test_bytes_and_vector_and_back(parameters: Parameters) -> None:
    """Names, shapes and values survive, scalars and empty tensors among them."""
    layout = Layout.of(parameters)
    for back in (
        from_bytes(to_bytes(parameters)),
        layout.unflatten(layout.flatten(parameters)),
    ):
        assert Layout.of(back) == layout
        for name, value in parameters.items():
            np.testing.assert_array_equal(back[name], value)


@given(parameters=PARAMETERS)
@settings(max_examples=50)
def test_bytes_are_those_of_the_safetensors_library(parameters: Parameters) -> None:
    """Head, padding and order are what the format's own library writes."""
    named = {name + "ä": value for name, value in parameters.items()}
    assert to_bytes(named) == save({name: value.copy("C") for name, value in named.items()})


def test_reading_a_file_piece_by_piece(tmp_path: Path) -> None:
    """A file's layout, tensors and blocks come as from its bytes, in the order of the vector."""
    parameters = {
        "wide": np.arange(2 * BLOCK_VALUES + 5, dtype=np.float32),
        "nothing": np.empty((0, 3), np.float32),
        "w": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.float32([7]),
        "scale": np.array(3, np.float32),
    }
    path = tmp_path / "model"
    path.write_bytes(to_bytes(parameters))
    assert read_layout(path) == Layout.of(parameters)
    file = ParameterFile.open(path)
    assert [tensor.shape for tensor in file.tensors()] == list(file.layout.shapes)
    vector = np.concatenate([tensor.ravel() for tensor in file.tensors()])
    np.testing.assert_array_equal(vector, Layout.of(parameters).flatten(parameters))
    blocks = list(file.blocks())
    np.testing.assert_array_equal(np.concatenate([values for _, values in blocks]), vector)
    assert max(values.size for _, values in blocks) == BLOCK_VALUES
    assert [name for name, _ in blocks] == ["b", "scale", "w", "wide", "wide", "wide"]


def test_tensors_may_lie_in_any_order(tmp_path: Path) -> None:
    """A file whose tensors do not lie in the order of their names is read by name."""
    head = b'{"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    head += b'"a":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}'
    values = np.float32([1, 2, 3])
    path = tmp_path / "model"
    path.write_bytes(len(head).to_bytes(8, "little") + head + values.tobytes())
    tensors = read_parameters(path)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [3], "b": [1, 2]}


def test_file_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    """What is missing at the end is told, not made up."""
    path = tmp_path / "model"
    path.write_bytes(to_bytes({"w": np.ones(8, np.float32)}))
    file = ParameterFile.open(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(PeerError, match="cut"):
        list(file.blocks())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",
        bytes(8) + b"{}",
        (2**60).to_bytes(8, "little"),
        b"\x02" + bytes(7) + b"{}more than the header says",
        b"\x40" + bytes(7) + b'{"w":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}' + bytes(18),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    """What is no safetensors file of float32 is refused in every way of reading it."""
    path = tmp_path / "model"
    path.write_bytes(content)
    with pytest.raises(PeerError):
        from_bytes(content)
    with pytest.raises(PeerError):
        ParameterFile.open(path)


def test_missing_file(tmp_path: Path) -> None:
    """A file that is not there is told apart from one that is no model."""
    with pytest.raises(MissingBlobError):
        read_layout(tmp_path / "model")
