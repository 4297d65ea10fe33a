"""How a round's events are written down and read back.

What came from a device is kept as the wire message that brought it; the coordinator's own events
are small JSON objects.
"""

import json
from collections.abc import Iterable
from typing import Any

from minga.federation import wire
from minga.federation.coordinator.rounds import (
    DeadlinePassed,
    DeviceLost,
    Event,
    Round,
    RoundFailed,
    RoundOrder,
    Stage,
    SumComputed,
    open_round,
)
from minga.federation.coordinator.store import EventRow
from minga.federation.v1 import federation_pb2 as pb

_MESSAGE = "message"


def encode(round_id: str, event: Event, at: float) -> EventRow:
    """Write one event down."""
    match event:
        case DeviceLost(device_id=device_id, reason=reason):
            return _row(at, "lost", {"reason": reason}, device_id)
        case DeadlinePassed(stage=stage):
            return _row(at, "deadline", {"stage": stage.name})
        case SumComputed():
            return _row(at, "sum", _sum(event))
        case RoundFailed(reason=reason):
            return _row(at, "failed", {"reason": reason})
        case _:
            payload = wire.event_to_wire(round_id, event).SerializeToString()
            return EventRow(at=at, device_id=event.device_id, kind=_MESSAGE, payload=payload)


def _sum(event: SumComputed) -> dict[str, Any]:
    return {
        "model_digest": event.model_digest.hex(),
        "total_weight": event.total_weight,
        "optimizer_digest": event.optimizer_digest.hex(),
        "rejected": event.rejected,
        "metrics": event.metrics,
        "answer": event.answer,
        "liars": event.liars,
        "max_norm": event.max_norm,
    }


def _row(at: float, kind: str, values: dict[str, Any], device_id: str = "") -> EventRow:
    return EventRow(at=at, device_id=device_id, kind=kind, payload=json.dumps(values).encode())


def decode(row: EventRow) -> Event:
    """Read one event back."""
    if row.kind == _MESSAGE:
        return wire.event_from_wire(row.device_id, pb.SessionRequest.FromString(row.payload))[1]
    values = json.loads(row.payload)
    match row.kind:
        case "lost":
            return DeviceLost(device_id=row.device_id, reason=values["reason"])
        case "deadline":
            return DeadlinePassed(stage=Stage[values["stage"]])
        case "sum":
            return SumComputed(
                model_digest=bytes.fromhex(values["model_digest"]),
                total_weight=values["total_weight"],
                optimizer_digest=bytes.fromhex(values.get("optimizer_digest", "")),
                rejected=tuple((name, reason) for name, reason in values.get("rejected", ())),
                metrics=tuple((name, value) for name, value in values.get("metrics", ())),
                answer=tuple(values.get("answer", ())),
                liars=tuple(values.get("liars", ())),
                max_norm=values.get("max_norm", 0.0),
            )
        case "failed":
            return RoundFailed(reason=values["reason"])
        case kind:
            raise AssertionError(f"an event of unknown kind {kind!r}")


def replay(order: RoundOrder, started_at: float, events: Iterable[EventRow]) -> Round:
    """Rebuild a round from its events."""
    round_ = open_round(order, started_at)
    for row in events:
        round_.apply(decode(row), row.at)
    return round_
