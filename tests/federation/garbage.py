"""Messages that make no sense: noise, damaged messages, and well-formed ones with nasty values."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from minga.federation.v1 import federation_pb2 as pb

_DEPTH = 4
_INTEGERS = {
    FieldDescriptor.TYPE_UINT32: (0, 1, 3, 16, 2**31, 2**32 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 1, 1000, 2**32, 2**63, 2**64 - 1),
    FieldDescriptor.TYPE_INT64: (0, -1, 1, -(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_INT32: (0, -1, 1, -(2**31), 2**31 - 1),
}
_DOUBLES = (0.0, -0.0, 1.0, -1.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"))
_TEXTS = ("", "mallory", "\x00", "\n", "../../etc", "ab" * 16, "\u202e", "x" * 64, "y" * 2000)
_SIZES = (0, 1, 16, 31, 32, 32, 32, 33, 64, 71, 600, 3000)


class Garbage:
    """A source of bad messages; the same seed gives the same ones.

    Args:
        seed: Where it starts.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.known: list[str] = []
        """Names that exist, for instance of the open round: what uses them gets further."""

    def noise(self) -> bytes:
        """Give bytes of no meaning."""
        return self.random.randbytes(self.random.choice((0, 1, 2, 7, 40, 300)))

    def nasty(self, kind: type[Message]) -> bytes:
        """Give a well-formed message that holds anything."""
        message = kind()
        self._fill(message, _DEPTH)
        return message.SerializeToString()

    def spoil(self, message: Message, num_fields: int) -> None:
        """Put anything into some fields of a message that holds no others."""
        for field in self.random.sample(list(message.DESCRIPTOR.fields), num_fields):
            message.ClearField(field.name)
            self._set(message, field, _DEPTH)

    def damaged(self, data: bytes) -> bytes:
        """Give a message with a few changed, lost, doubled or foreign bytes."""
        chance = self.random
        piece = bytearray(data)
        for _ in range(chance.choice((1, 1, 2, 5))):
            at = chance.randrange(len(piece) + 1)
            match chance.randrange(4):
                case 0 if at < len(piece):
                    piece[at] ^= 1 << chance.randrange(8)
                case 1:
                    del piece[at : at + chance.choice((1, 2, 30))]
                case 2:
                    piece[at:at] = piece[at : at + 50]
                case _:
                    piece[at:at] = chance.randbytes(chance.choice((1, 2, 8)))
        return bytes(piece)

    def pool(self, kinds: Sequence[type[Message]], size: int) -> list[bytes]:
        """Give nasty messages of some kinds, to be sent as they are and damaged."""
        return [self.nasty(self.random.choice(kinds)) for _ in range(size)]

    def any_of(self, pool: list[bytes]) -> bytes:
        """Give noise, one of a pool, or one of them damaged."""
        which = self.random.random()
        if which < 0.2:
            return self.noise()
        data = self.random.choice(pool)
        return data if which < 0.5 else self.damaged(data)

    # --- filling ---

    def _fill(self, message: Message, depth: int) -> None:
        descriptor = message.DESCRIPTOR
        fields = list(descriptor.fields)
        if descriptor.oneofs:
            one = self.random.choice(list(descriptor.oneofs))
            fields = [f for f in fields if f.containing_oneof is None]
            self._set(message, self.random.choice(list(one.fields)), depth)
        for field in fields:
            if self.random.random() < 0.8:
                self._set(message, field, depth)

    def _set(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        if field.is_repeated:
            self._add(message, field, depth)
        elif field.message_type is None:
            setattr(message, field.name, self._value(field))
        elif depth:
            inner = getattr(message, field.name)
            inner.SetInParent()
            self._fill(inner, depth - 1)

    def _add(self, message: Message, field: FieldDescriptor, depth: int) -> None:
        values = getattr(message, field.name)
        for _ in range(self.random.choice((0, 1, 3))):
            if field.message_type is None:
                values.append(self._value(field))
            elif not field.message_type.GetOptions().map_entry:
                if depth:
                    self._fill(values.add(), depth - 1)
            elif field.message_type.fields_by_name["value"].message_type is not None and depth:
                self._fill(values[self._text()], depth - 1)

    def _value(self, field: FieldDescriptor) -> Any:
        makers: dict[int, Callable[[], Any]] = {
            FieldDescriptor.TYPE_STRING: self._text,
            FieldDescriptor.TYPE_BYTES: lambda: self.random.randbytes(self.random.choice(_SIZES)),
            FieldDescriptor.TYPE_BOOL: lambda: self.random.random() < 0.5,
            FieldDescriptor.TYPE_DOUBLE: lambda: self.random.choice(_DOUBLES),
            FieldDescriptor.TYPE_ENUM: lambda: self.random.choice((0, 1, 2, 99, -1)),
        }
        if field.type in makers:
            return makers[field.type]()
        return self.random.choice(_INTEGERS[field.type])

    def _text(self) -> str:
        return self.random.choice((*_TEXTS, *self.known * 4))


def is_heartbeat(data: bytes) -> bool:
    """Tell whether the coordinator answers bytes on a control stream with a heartbeat."""
    try:
        return pb.SessionRequest.FromString(data).WhichOneof("body") == "heartbeat"
    except DecodeError:
        return False
