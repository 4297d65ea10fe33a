"""Tensors on the wire: exact in both directions, or refused."""

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.inference.errors import BadRequestError
from minga.inference.tensors import (
    Datatype,
    TensorSpec,
    from_binary,
    from_json,
    parse_datatype,
    parse_shape,
    to_binary,
    to_json,
)

NUMERIC = [datatype for datatype in Datatype if datatype is not Datatype.BYTES]
JSON_NUMERIC = [datatype for datatype in NUMERIC if datatype is not Datatype.FP16]
SHAPES = arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def numeric(datatypes, **elements):
    """Arrays of any shape, of one of the datatypes."""
    return st.sampled_from(datatypes).flatmap(
        lambda datatype: st.tuples(
            st.just(datatype),
            arrays.arrays(
                datatype.dtype,
                SHAPES,
                elements=arrays.from_dtype(datatype.dtype, **elements),
            ),
        )
    )


@given(numeric(NUMERIC))
def test_binary_round_trip_keeps_every_bit(case):
    """Any numeric array survives its raw form, NaN payloads and infinities included."""
    datatype, array = case
    raw = to_binary(array, name="x")
    back = from_binary(memoryview(raw), datatype=datatype, shape=array.shape, name="x")
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(numeric(JSON_NUMERIC, allow_nan=False, allow_infinity=False), st.booleans())
def test_json_round_trip_keeps_every_value(case, nested):
    """Any finite array survives its JSON form, flat and nested alike."""
    datatype, array = case
    data = array.tolist() if nested and array.ndim else to_json(array, name="x")
    text = orjson.dumps(data, option=orjson.OPT_SERIALIZE_NUMPY)
    back = from_json(orjson.loads(text), datatype=datatype, shape=array.shape, name="x")
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_strings_round_trip_in_both_forms(texts):
    """Strings survive raw and JSON, empty ones and those with NUL bytes included."""
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    raw = to_binary(array, name="x")
    shape = array.shape
    back = from_binary(memoryview(raw), datatype=Datatype.BYTES, shape=shape, name="x")
    assert back.tolist() == texts
    text = orjson.dumps(to_json(array, name="x"))
    back = from_json(orjson.loads(text), datatype=Datatype.BYTES, shape=shape, name="x")
    assert back.tolist() == texts


@given(st.binary(max_size=64), st.sampled_from(list(Datatype)), SHAPES)
def test_arbitrary_bytes_are_a_tensor_or_refused(raw, datatype, shape):
    """No bytes make a tensor of another size, and none raise anything but the protocol's error."""
    try:
        array = from_binary(memoryview(raw), datatype=datatype, shape=shape, name="x")
    except BadRequestError:
        return
    assert array.shape == shape
    assert array.size == math.prod(shape)


def test_unaligned_bytes_become_an_aligned_array():
    """A tensor that follows an odd-sized JSON part is copied to where words may be loaded."""
    raw = memoryview(b"!" + np.arange(4, dtype=np.float64).tobytes())[1:]
    array = from_binary(raw, datatype=Datatype.FP64, shape=(4,), name="x")
    assert array.flags.aligned
    assert array.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("data", "datatype", "shape"),
    [
        pytest.param([1.0, 2.0], "FP32", (3,), id="too-short"),
        pytest.param([1.0, 2.0], "FP32", (1,), id="too-long"),
        pytest.param([[1.0], [2.0, 3.0]], "FP32", (2, 1), id="ragged"),
        pytest.param([[1.0, 2.0], [3.0, 4.0]], "FP32", (4,), id="nested-too-deep"),
        pytest.param([[1.0, 2.0, 3.0, 4.0]], "FP32", (1, 2, 2), id="half-nested"),
        pytest.param([1.0, [2.0]], "FP32", (2,), id="list-among-numbers"),
        pytest.param([[1.0], 2.0], "FP32", (2, 1), id="number-among-lists"),
        pytest.param(1.0, "FP32", (), id="no-list"),
        pytest.param(None, "FP32", (1,), id="no-data"),
        pytest.param([None], "FP32", (1,), id="null"),
        pytest.param(["1"], "FP32", (1,), id="string-as-number"),
        pytest.param([True], "FP32", (1,), id="boolean-as-number"),
        pytest.param([1, True], "INT32", (2,), id="boolean-among-integers"),
        pytest.param([1.0], "INT32", (1,), id="float-as-integer"),
        pytest.param([1], "BOOL", (1,), id="integer-as-boolean"),
        pytest.param([1], "BYTES", (1,), id="number-as-string"),
        pytest.param([{}], "FP32", (1,), id="object"),
        pytest.param([256], "UINT8", (1,), id="over-uint8"),
        pytest.param([-1], "UINT64", (1,), id="negative-unsigned"),
        pytest.param([-129], "INT8", (1,), id="under-int8"),
        pytest.param([2.0**64], "UINT64", (1,), id="over-uint64"),
        pytest.param([1e39], "FP32", (1,), id="over-fp32"),
        pytest.param([1.0], "FP16", (1,), id="fp16-has-no-json"),
        pytest.param([], "FP32", (), id="empty-scalar"),
        pytest.param([[]], "FP32", (0,), id="empty-nested-too-deep"),
    ],
)
def test_json_data_that_is_refused(data, datatype, shape):
    """Data that does not fill its shape, or is not of its datatype, is an error with the name."""
    with pytest.raises(BadRequestError, match="'x'"):
        from_json(data, datatype=Datatype(datatype), shape=shape, name="x")


@pytest.mark.parametrize(
    ("raw", "datatype", "shape"),
    [
        pytest.param(b"\0" * 7, "FP32", (2,), id="truncated"),
        pytest.param(b"\0" * 9, "FP32", (2,), id="trailing"),
        pytest.param(b"\2", "BOOL", (1,), id="boolean-two"),
        pytest.param(b"\1\0\0", "BYTES", (1,), id="prefix-cut"),
        pytest.param(b"\5\0\0\0abc", "BYTES", (1,), id="string-cut"),
        pytest.param(b"\1\0\0\0ab", "BYTES", (1,), id="bytes-after-strings"),
        pytest.param(b"\xff\xff\xff\xff", "BYTES", (1,), id="huge-length"),
        pytest.param(b"\1\0\0\0\xff", "BYTES", (1,), id="not-utf8"),
        pytest.param(b"", "BYTES", (1 << 39,), id="many-strings-from-nothing"),
    ],
)
def test_raw_data_that_is_refused(raw, datatype, shape):
    """Bytes that do not fill the shape exactly are an error with the tensor's name."""
    with pytest.raises(BadRequestError, match="'x'"):
        from_binary(memoryview(raw), datatype=Datatype(datatype), shape=shape, name="x")


@pytest.mark.parametrize(
    "shape",
    [
        None,
        3,
        "[3]",
        {},
        [-1],
        [1.0],
        [True],
        ["1"],
        [None],
        [[1]],
        [1] * 33,
        [0, 1 << 62],
        [1 << 41],
    ],
)
def test_shapes_that_are_refused(shape):
    """A shape is a short list of non-negative integers."""
    with pytest.raises(BadRequestError, match="'x'"):
        parse_shape(shape, name="x")


@pytest.mark.parametrize("datatype", [None, 1, "fp32", "BF16", "STRING", [], {}])
def test_datatypes_that_are_refused(datatype):
    """Only the protocol's names, in its spelling, are datatypes."""
    with pytest.raises(BadRequestError, match="'x'"):
        parse_datatype(datatype, name="x")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_json_refuses_what_it_cannot_carry(value, dtype):
    """An output with NaN or infinity is refused in JSON, with the remedy, never sent as null."""
    with pytest.raises(BadRequestError, match="binary output"):
        to_json(np.array([1, value], dtype), name="x")


def test_messages_do_not_grow_with_the_request():
    """A huge wrong value is cut in the message about it."""
    with pytest.raises(BadRequestError) as refusal:
        parse_shape(["a" * 1000] * 1000, name="x")
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    ("spec", "shape", "fits"),
    [
        ((-1, 3), (5, 3), True),
        ((-1, 3), (0, 3), True),
        ((-1, 3), (5, 4), False),
        ((-1, 3), (3,), False),
        ((), (), True),
        ((), (1,), False),
    ],
)
def test_a_spec_fits_by_rank_and_fixed_dimensions(spec, shape, fits):
    """Variable dimensions take any length, fixed ones their own, and the rank must agree."""
    tensor = TensorSpec(name="x", datatype=Datatype.FP32, shape=spec)
    assert tensor.fits(shape) is fits


@pytest.mark.parametrize("dtype", [np.complex64, "datetime64[s]", np.void])
def test_arrays_without_a_datatype_are_refused(dtype):
    """An array that the protocol cannot name is refused before it is sent."""
    with pytest.raises(BadRequestError, match="no datatype"):
        Datatype.of(np.zeros(1, dtype))
