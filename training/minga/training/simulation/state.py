"""What an interrupted simulation goes on from: one file, wholly there or not at all."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.numpy import save

from minga.federation.durable import replace_file
from minga.federation.v1 import federation_pb2 as pb
from minga.training.errors import DataError
from minga.training.history import Record
from minga.training.simulation.fleet import Keepings, Reply, Upload
from minga.training.simulation.lesson import Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A campaign between two rounds; nothing in it changes when the next one is played."""

    travelling: Vector
    optimizer_state: Mapping[str, Vector]
    now: float
    replies: Sequence[tuple[float, int, Reply]]
    spent: Mapping[str, str]
    kept: Keepings
    records: Sequence[pb.Round]


def write_state(file: Path, state: State, history: Sequence[Record]) -> None:
    """Write down where a campaign is.

    Raises:
        OSError: the disk fails.
    """
    arrays: dict[str, Vector] = {"travelling": state.travelling}
    for kind, vectors in (
        ("optimizer", state.optimizer_state),
        ("control", state.kept.controls),
        ("personal", state.kept.personal),
        ("staged-control", {n: c for n, (c, _) in state.kept.staged.items() if c is not None}),
        ("staged-personal", {n: p for n, (_, p) in state.kept.staged.items() if p is not None}),
    ):
        arrays |= {f"{kind}/{name}": vector for name, vector in vectors.items()}
    replies: list[dict[str, Any]] = []
    for time, tie, reply in state.replies:
        entry = {"time": time, "tie": tie, "device": reply.device_id, "reason": reply.reason}
        if reply.upload is not None:
            arrays[f"upload/{reply.device_id}"] = reply.upload.values
            entry["weight"] = reply.upload.weight
        replies.append(entry)
    said = {
        "history": list(history),
        "now": state.now,
        "replies": replies,
        "spent": dict(state.spent),
        "records": [
            base64.b64encode(record.SerializeToString()).decode() for record in state.records
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save(arrays, metadata={"minga": json.dumps(said)}))


def read_state(file: Path) -> tuple[State, list[Record]]:
    """Read what `write_state` wrote.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            said = json.loads(opened.metadata()["minga"])
            names: list[str] = list(opened.keys())
            arrays: dict[str, Vector] = {name: opened.get_tensor(name) for name in names}
        controls, personal = _under("staged-control", arrays), _under("staged-personal", arrays)
        staged = {
            name: (controls.get(name), personal.get(name))
            for name in controls.keys() | personal.keys()
        }
        state = State(
            travelling=arrays["travelling"],
            optimizer_state=_under("optimizer", arrays),
            now=said["now"],
            replies=[
                (entry["time"], entry["tie"], _reply(entry, arrays)) for entry in said["replies"]
            ],
            spent=said["spent"],
            kept=Keepings(
                controls=_under("control", arrays),
                personal=_under("personal", arrays),
                staged=staged,
            ),
            records=[pb.Round.FromString(base64.b64decode(text)) for text in said["records"]],
        )
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged ({error}); start anew with: minga simulate --fresh"
        ) from error
    history: list[Record] = said["history"]
    return state, history


def _under(kind: str, arrays: Mapping[str, Vector]) -> dict[str, Vector]:
    start = f"{kind}/"
    return {n.removeprefix(start): value for n, value in arrays.items() if n.startswith(start)}


def _reply(entry: Mapping[str, Any], arrays: Mapping[str, Vector]) -> Reply:
    reply = Reply(device_id=entry["device"], after_s=0.0, upload=None, reason=entry["reason"])
    if "weight" not in entry:
        return reply
    values = arrays[f"upload/{entry['device']}"]
    return replace(reply, upload=Upload(values=values, weight=entry["weight"]))
