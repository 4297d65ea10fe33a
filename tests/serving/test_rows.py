"""Inputs that people write: rows in JSON and CSV, fitted to the model's metadata."""

import numpy as np
import pytest

from minga.inference.errors import BadRequestError
from minga.inference.rows import read_csv, read_json


def metadata(*inputs):
    """A model's metadata with inputs of (name, datatype, shape)."""
    return {
        "name": "m",
        "inputs": [
            {"name": name, "datatype": datatype, "shape": shape} for name, datatype, shape in inputs
        ],
    }


FLAT = metadata(("input", "FP32", [-1, 3]))
IMAGE = metadata(("input", "FP32", [-1, 1, 2, 2]))
PAIR = metadata(("left", "FP32", [-1, 2]), ("right", "INT64", [-1]))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        pytest.param("[[1, 2, 3], [4, 5, 6]]", [[1, 2, 3], [4, 5, 6]], id="rows"),
        pytest.param("[1, 2, 3]", [[1, 2, 3]], id="one-row"),
        pytest.param('{"input": [[1, 2, 3]]}', [[1, 2, 3]], id="by-name"),
        pytest.param(
            '{"inputs":[{"name":"input","datatype":"FP32","shape":[1,3],"data":[1,2,3]}]}',
            [[1, 2, 3]],
            id="whole-request",
        ),
    ],
)
def test_json_rows_become_the_models_input(text, wanted):
    """Rows, one row, rows by name and a whole request are all understood."""
    inputs = read_json(text.encode(), FLAT)
    assert inputs["input"].dtype == np.float32
    assert inputs["input"].tolist() == wanted


def test_several_inputs_are_given_by_name():
    """A model with several inputs takes an object of rows, each of its own type."""
    inputs = read_json(b'{"left": [[1, 2]], "right": [7]}', PAIR)
    assert inputs["left"].tolist() == [[1, 2]]
    assert inputs["right"].dtype == np.int64


def test_flat_rows_are_folded_into_inner_dimensions():
    """A row of as many numbers as an image has pixels becomes the image."""
    assert read_json(b"[[1, 2, 3, 4]]", IMAGE)["input"].tolist() == [[[[1, 2], [3, 4]]]]
    assert read_csv("1,2,3,4\n", IMAGE)["input"].tolist() == [[[[1, 2], [3, 4]]]]


@pytest.mark.parametrize(
    "text",
    ["1,2,3\n4,5,6\n", "a,b,c\n1,2,3\n4,5,6", "1, 2, 3\r\n\r\n4,5,6\r\n", '"1","2","3"\n4,5,6'],
    ids=["plain", "header", "spaces-and-blank-lines", "quoted"],
)
def test_csv_lines_become_rows(text):
    """CSV is read with and without names, quotes, spaces and blank lines."""
    assert read_csv(text, FLAT)["input"].tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("datatype", "text", "wanted"),
    [
        ("INT32", "1,-2\n", [[1, -2]]),
        ("BOOL", "true,0\n", [[True, False]]),
        ("BYTES", "a,b\nc,d\n", [["a", "b"], ["c", "d"]]),
    ],
)
def test_csv_cells_are_read_by_the_models_type(datatype, text, wanted):
    """Integers, booleans and text are read as the model declares them; text has no header."""
    spec = metadata(("input", datatype, [-1, 2]))
    assert read_csv(text, spec)["input"].tolist() == wanted


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        pytest.param("rows", FLAT, "not JSON", id="no-json"),
        pytest.param("[[1, 2], [3]]", FLAT, "does not fill", id="ragged"),
        pytest.param('[["a", "b", "c"]]', FLAT, "must not contain str", id="text"),
        pytest.param("null", FLAT, "must be a list", id="null"),
        pytest.param("[[1, 2]]", PAIR, "several inputs", id="which-input"),
        pytest.param('{"middle": [1]}', PAIR, "has no input 'middle'", id="no-such-input"),
    ],
)
def test_json_that_is_no_input_is_refused(text, spec, message):
    """What does not fit is one error that says what does."""
    with pytest.raises(BadRequestError, match=message):
        read_json(text.encode(), spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "no rows", id="empty"),
        pytest.param("a,b,c\n", "no rows", id="only-names"),
        pytest.param("1,2,3\n4,x,6\n", "row 2: 'x'", id="no-number"),
        pytest.param("1,2,3\n4,5\n", "does not fill", id="ragged"),
        pytest.param("1,2,nan\n", "out of range", id="nan"),
    ],
)
def test_csv_that_is_no_input_is_refused(text, message):
    """A bad cell is named with its row; NaN is not silently sent."""
    with pytest.raises(BadRequestError, match=message):
        read_csv(text, FLAT)
