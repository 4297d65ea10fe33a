"""What strategies keep, written and read back as data."""

from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import Parameters, ndarrays_to_parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from minga.federation.errors import StrategyError
from minga.federation.flower.state import dump, held_by, restore

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


def carried(value: object) -> object:
    """Give a value after it was kept and restored."""
    before, after = SimpleNamespace(value=value), SimpleNamespace(value=None)
    restore(after, dump(before, {}))
    return after.value


def same(one: object, other: object) -> bool:
    """Compare with kinds, and NaN equal to itself."""
    return type(one) is type(other) and repr(one) == repr(other)


@given(VALUES)
@settings(max_examples=50)
def test_plain_values_come_back(value: object) -> None:
    """Numbers, texts, bytes and what holds them come back with their kinds."""
    assert same(carried(value), value)


@pytest.mark.parametrize(
    "array",
    [
        np.array(1.5),
        np.arange(6, dtype=np.int64).reshape(2, 3).T,
        np.array([True, False]),
        np.zeros((0, 3), np.float16),
        np.arange(3, dtype=">f8"),
        np.float32(0.1),
        np.int64(-7),
    ],
)
def test_arrays_come_back(array: np.ndarray) -> None:
    """Arrays of any shape and NumPy's numbers come back with dtype, shape and values."""
    back = carried([array])[0]  # type: ignore[index]
    assert isinstance(back, np.ndarray) == isinstance(array, np.ndarray)
    assert back.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(back, array)


def test_flowers_kinds_come_back() -> None:
    """Parameters and records come back as what they are."""
    parameters = ndarrays_to_parameters([np.ones(3), np.zeros((2, 2), np.float32)])
    back = carried({"p": parameters})["p"]  # type: ignore[index]
    assert isinstance(back, Parameters)
    assert back == parameters
    for record in (
        ArrayRecord({"w": Array(np.arange(4.0)), "b": Array(np.float32([1]))}),
        MetricRecord({"loss": 0.5, "each": [1, 2]}),
        ConfigRecord({"lr": 0.1, "name": "x", "key": b"k", "on": True}),
    ):
        assert carried(record) == record
        assert type(carried(record)) is type(record)


def test_what_the_constructor_made_stays() -> None:
    """Functions and the like are the constructor's; a new one is named when it is missed."""
    before = SimpleNamespace(rate=1.0, schedule=abs, late=None)
    held = held_by(before)
    before.rate = 0.5
    after = SimpleNamespace(rate=1.0, schedule=max, late=None)
    restore(after, dump(before, held))
    assert (after.rate, after.schedule) == (0.5, max)
    before.late = len
    with pytest.raises(StrategyError, match=r"it keeps late \(a builtin_function_or_method\)"):
        restore(after, dump(before, held))


def test_endless_values_are_no_data() -> None:
    """A list that holds itself is not followed for ever."""
    endless: list[object] = []
    endless.append(endless)
    data = dump(SimpleNamespace(endless=endless), {})
    with pytest.raises(StrategyError, match=r"endless \(a list\)"):
        restore(SimpleNamespace(), data)


@pytest.mark.parametrize("data", [b"", b"\x00" * 40, b"cos\nsystem\n(S'true'\ntR."])
def test_damaged_state(data: bytes) -> None:
    """Bytes that are no state are refused; a pickle is just that."""
    with pytest.raises(StrategyError, match="cannot be read"):
        restore(SimpleNamespace(), data)
