"""Reads TensorBoard's files, as they are at the moment: also while somebody writes them."""

import struct
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def events_of(folder: Path) -> Iterator[Event]:
    """Give the events below a folder, without a last one that is not written to its end.

    A record is its length (8 bytes), a checksum (4), the event, and a checksum (4).
    """
    for file in sorted(folder.rglob("events.*")):
        data, at = file.read_bytes(), 0
        while at + 12 <= len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            if at + 16 + length > len(data):
                break
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length


def points_of(folder: Path, tag: str) -> dict[int, float]:
    """Give a curve below a folder: step -> value."""
    return {
        event.step: value.simple_value
        for event in events_of(folder)
        for value in event.summary.value
        if value.tag == tag
    }
