"""Model inputs from what people write: rows in JSON or CSV, fitted to a model's metadata.

A JSON text is a request of the protocol (an object with `inputs`), an object of rows by input
name, or just rows for a model with one input. A CSV text is one row per line, with or without
a line of column names. One row alone needs no brackets of its own.
"""

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

import orjson

from minga.inference.errors import BadRequestError
from minga.inference.protocol import Message, decode_request
from minga.inference.tensors import (
    Array,
    Datatype,
    TensorSpec,
    from_json,
    parse_datatype,
)


def read_json(text: bytes, metadata: Mapping[str, Any]) -> dict[str, Array]:
    """Make inputs of a JSON text.

    Args:
        text: the JSON.
        metadata: the model's, as the server gives it.

    Raises:
        BadRequestError: the text is no JSON, or its rows are no tensors of the model's types.
    """
    try:
        content = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"the input is not JSON: {error}") from None
    if isinstance(content, dict) and "inputs" in content:
        return dict(decode_request(Message(body=text)).inputs)
    specs = _specs(metadata)
    if not isinstance(content, dict):
        content = {_only(specs, metadata).name: content}
    return {name: _tensor(rows, _named(specs, name, metadata)) for name, rows in content.items()}


def read_csv(text: str, metadata: Mapping[str, Any]) -> dict[str, Array]:
    """Make the input of a model with one input of a CSV text.

    Args:
        text: the CSV, all of its columns in the model's order.
        metadata: the model's, as the server gives it.

    Raises:
        BadRequestError: a cell is no value of the model's type, or lines differ in length.
    """
    spec = _only(_specs(metadata), metadata)
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    if lines and spec.datatype is not Datatype.BYTES and not any(map(_is_number, lines[0])):
        lines = lines[1:]
    if not lines:
        raise BadRequestError("the CSV has no rows")
    rows = [[_cell(cell, spec.datatype, row) for cell in line] for row, line in enumerate(lines, 1)]
    return {spec.name: _tensor(rows, spec)}


def _tensor(rows: object, spec: TensorSpec) -> Array:
    """Make a tensor, adding the batch dimension of a row alone and restoring inner ones."""
    shape = _shape_of(rows)
    if len(shape) == len(spec.shape) - 1:
        rows, shape = [rows], (1, *shape)
    array = from_json(rows, datatype=spec.datatype, shape=shape, name=spec.name)
    inner = spec.shape[1:]
    if len(shape) == 2 and -1 not in inner and math.prod(inner) == shape[1]:
        return array.reshape(shape[0], *inner)
    return array


def _shape_of(rows: object) -> tuple[int, ...]:
    shape = []
    while isinstance(rows, list):
        shape.append(len(rows))
        rows = rows[0] if rows else None
    return tuple(shape)


def _cell(cell: str, datatype: Datatype, row: int) -> bool | float | str:
    try:
        match datatype.dtype.kind:
            case "O":
                return cell
            case "f":
                return float(cell)
            case "b":
                return {"true": True, "1": True, "false": False, "0": False}[cell.strip().lower()]
            case _:
                return int(cell)
    except (ValueError, KeyError):
        raise BadRequestError(f"CSV row {row}: {cell!r} is no {datatype}") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell.strip().lower() in ("true", "false")
    return True


def _specs(metadata: Mapping[str, Any]) -> list[TensorSpec]:
    return [
        TensorSpec(
            name=entry["name"],
            datatype=parse_datatype(entry["datatype"], name=entry["name"]),
            shape=tuple(entry["shape"]),
        )
        for entry in metadata["inputs"]
    ]


def _only(specs: list[TensorSpec], metadata: Mapping[str, Any]) -> TensorSpec:
    if len(specs) != 1:
        names = ", ".join(spec.name for spec in specs)
        raise BadRequestError(
            f"model '{metadata['name']}' has several inputs ({names}); "
            "give a JSON object of rows by input name"
        )
    return specs[0]


def _named(specs: list[TensorSpec], name: str, metadata: Mapping[str, Any]) -> TensorSpec:
    for spec in specs:
        if spec.name == name:
            return spec
    names = ", ".join(spec.name for spec in specs)
    raise BadRequestError(f"model '{metadata['name']}' has no input '{name}', only {names}")
