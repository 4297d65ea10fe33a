"""What a strategy keeps from round to round, as data: no pickle, so reading it runs no code.

All attributes of the strategy's object that are made of numbers, texts, arrays, lists, tuples and
dicts, of Flower's parameters and records, and of nested strategies, are written as safetensors.
Whatever else it holds, such as functions, is made anew by its constructor. Where the strategy put
such a thing into an attribute later, nothing could make it again: the state then names it and is
refused by `restore`, which is only called after the coordinator restarted or a step failed.

Not seen, and so not kept: what changes inside of such an object, of the class or of the module.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.common import Parameters
from flwr.server.strategy import Strategy as FitStrategy
from flwr.serverapp.strategy import Strategy as TrainStrategy
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from minga.federation.errors import StrategyError

Held = Mapping[str, object]
"""Attribute's path -> the object that the constructor put there."""

_TREE: Final = "tree"
_MAX_DEPTH: Final = 32


class _UnknownKindError(Exception):
    """A value is of a kind that has no form as data."""


def held_by(strategy: object, prefix: str = "") -> Held:
    """Note what a strategy holds, right after it was made."""
    held: dict[str, object] = {}
    for name, value in vars(strategy).items():
        held[prefix + name] = value
        if isinstance(value, FitStrategy | TrainStrategy) and len(prefix) < _MAX_DEPTH:
            held |= held_by(value, f"{prefix}{name}.")
    return held


def dump(strategy: object, made_with: Held) -> bytes:
    """Write what a strategy keeps.

    Args:
        strategy: the strategy.
        made_with: what it held right after it was made.
    """
    tensors: dict[str, NDArray[Any]] = {}
    lost: dict[str, str] = {}
    attributes = _attributes(strategy, "", tensors, made_with, lost)
    tree = json.dumps({"attributes": attributes, "lost": lost}).encode()
    data: bytes = save({**tensors, _TREE: np.frombuffer(tree, np.uint8)})
    return data


def restore(strategy: object, data: bytes) -> None:
    """Bring a strategy that was just made to where another of its kind was.

    Raises:
        StrategyError: the state is damaged, or it lacks what had no form as data.
    """
    try:
        tensors = load(data)
        tree = json.loads(tensors[_TREE].tobytes())
    except (SafetensorError, KeyError, ValueError) as error:
        raise StrategyError(f"the strategy's state cannot be read: {error}") from error
    if tree["lost"]:
        named = ", ".join(f"{name} (a {kind})" for name, kind in sorted(tree["lost"].items()))
        raise StrategyError(
            f"the strategy cannot go on after a restart: it keeps {named}, which is no data; keep "
            "numbers, texts, arrays, lists and dicts, or make the rest in its constructor"
        )
    _restore(strategy, tree["attributes"], tensors)


def _attributes(
    strategy: object,
    prefix: str,
    tensors: dict[str, NDArray[Any]],
    made_with: Held,
    lost: dict[str, str],
) -> dict[str, Any]:
    """Encode what has a form as data, and note what else was put there since the constructor."""
    kept: dict[str, Any] = {}
    for name, value in vars(strategy).items():
        path = prefix + name
        if isinstance(value, FitStrategy | TrainStrategy) and value is made_with.get(path):
            inner = _attributes(value, f"{path}.", tensors, made_with, lost)
            kept[name] = {"strategy": inner}
            continue
        try:
            kept[name] = _encode(value, tensors)
        except _UnknownKindError:
            if path not in made_with or value is not made_with[path]:
                lost[path] = type(value).__name__
    return kept


def _restore(strategy: object, attributes: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if isinstance(value, dict) and "strategy" in value:
            _restore(getattr(strategy, name), value["strategy"], tensors)
        else:
            setattr(strategy, name, _decode(value, tensors))


# --- values -----------------------------------------------------------------------------------


def _array_to_plain(array: Array) -> list[Any]:
    return [array.dtype, list(array.shape), array.stype, array.data]


def _array_from_plain(plain: list[Any]) -> Array:
    dtype, shape, stype, data = plain
    return Array(dtype, tuple(shape), stype, data)


_RECORDS: Final[dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]]] = {
    Parameters: (
        "parameters",
        lambda value: [value.tensor_type, list(value.tensors)],
        lambda plain: Parameters(tensor_type=plain[0], tensors=plain[1]),
    ),
    Array: ("flower_array", _array_to_plain, _array_from_plain),
    ArrayRecord: ("array_record", lambda value: dict(value.items()), ArrayRecord),
    MetricRecord: ("metric_record", lambda value: dict(value.items()), MetricRecord),
    ConfigRecord: ("config_record", lambda value: dict(value.items()), ConfigRecord),
}
"""Flower's own kinds: how each is called, and the way to plain values and back."""

_MAKERS: Final = {name: make for name, _, make in _RECORDS.values()}


def _encode(value: object, tensors: dict[str, NDArray[Any]], depth: int = 0) -> Any:
    """Give a value's form in JSON; arrays and bytes go into `tensors`.

    Raises:
        _UnknownKindError: it has none.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if depth > _MAX_DEPTH:
        raise _UnknownKindError
    if kind in _RECORDS:
        name, to_plain, _ = _RECORDS[kind]
        return {name: _encode(to_plain(value), tensors, depth + 1)}
    match value:
        case bytes():
            return {"bytes": _add(tensors, np.frombuffer(value, np.uint8))}
        case np.ndarray() | np.generic() if value.dtype.kind in "biuf" and value.itemsize <= 8:
            name = "array" if isinstance(value, np.ndarray) else "number"
            return {name: _add(tensors, np.asarray(value, value.dtype.newbyteorder("="), "C"))}
        case list() | tuple() if kind in (list, tuple):
            return {kind.__name__: [_encode(item, tensors, depth + 1) for item in value]}
        case dict() if kind is dict:
            items = [(_encode(k, tensors, _MAX_DEPTH), v) for k, v in value.items()]
            return {"dict": [[k, _encode(v, tensors, depth + 1)] for k, v in items]}
        case _:
            raise _UnknownKindError


def _add(tensors: dict[str, NDArray[Any]], array: NDArray[Any]) -> str:
    name = str(len(tensors))
    tensors[name] = array
    return name


def _decode(value: Any, tensors: Mapping[str, Any]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    match kind:
        case "bytes":
            return tensors[content].tobytes()
        case "array":
            return tensors[content].copy()
        case "number":
            return tensors[content][()]
        case "list":
            return [_decode(item, tensors) for item in content]
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
        case "dict":
            return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
        case _:
            return _MAKERS[kind](_decode(content, tensors))
