"""One canonical byte form for everything that is hashed, signed or bound into a key.

Each field carries its type and length, so that no two different field lists have the same bytes,
and the protocol's name and a purpose come first, so that bytes made for one purpose never serve
another.
"""

import struct
from typing import Final

PROTOCOL: Final = "minga secagg v1"

Field = bytes | str | bool | int | float


def encode(purpose: str, *fields: Field) -> bytes:
    """Write a purpose and some fields as unambiguous bytes."""
    return b"".join(_field(value) for value in (PROTOCOL, purpose, *fields))


def _field(value: Field) -> bytes:
    match value:
        case bytes():
            kind, body = b"x", value
        case str():
            kind, body = b"s", value.encode()
        case bool():  # before int, whose subclass it is
            kind, body = b"b", bytes([value])
        case int():
            kind, body = b"i", str(value).encode()
        case float():
            kind, body = b"f", struct.pack(">d", value)
    return kind + struct.pack(">I", len(body)) + body
