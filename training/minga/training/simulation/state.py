"""What an interrupted simulation goes on from: one file, wholly there or not at all."""

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.numpy import save

from minga.federation.durable import replace_file
from minga.federation.v1 import federation_pb2 as pb
from minga.training.history import Record
from minga.training.simulation.campaign import VirtualCampaign
from minga.training.simulation.fleet import Reply, Upload
from minga.training.simulation.lesson import Vector


def write_state(file: Path, running: VirtualCampaign, history: list[Record]) -> None:
    """Write down a campaign between two rounds.

    Raises:
        OSError: the disk fails.
    """
    arrays: dict[str, Vector] = {"travelling": running.travelling}
    arrays |= {f"optimizer/{name}": value for name, value in running.optimizer_state.items()}
    arrays |= {f"kept/{name}": value for name, value in running.fleet.kept().items()}
    replies: list[dict[str, Any]] = []
    for time, tie, reply in running.replies:
        entry = {"time": time, "tie": tie, "device": reply.device_id, "reason": reply.reason}
        if reply.upload is not None:
            arrays[f"upload/{reply.device_id}"] = reply.upload.values
            entry["weight"] = reply.upload.weight
        replies.append(entry)
    for name, (control, personal) in running.fleet.staged.items():
        arrays |= {f"staged-control/{name}": control} if control is not None else {}
        arrays |= {f"staged-personal/{name}": personal} if personal is not None else {}
    said = {
        "history": history,
        "now": running.now,
        "replies": replies,
        "spent": running.spent.entries,
        "records": [
            base64.b64encode(record.SerializeToString()).decode()
            for record in running.campaign.records
        ],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, save(arrays, metadata={"minga": json.dumps(said)}))


def read_state(file: Path, running: VirtualCampaign) -> list[Record]:
    """Take a campaign that has just begun to where `write_state` left it; give its history."""
    with safetensors.safe_open(file, framework="numpy") as opened:
        said = json.loads(opened.metadata()["minga"])
        names: list[str] = list(opened.keys())
        arrays: dict[str, Vector] = {name: opened.get_tensor(name) for name in names}
    for text in said["records"]:
        running.campaign.add_record(pb.Round.FromString(base64.b64decode(text)))
    running.resume(
        travelling=arrays["travelling"],
        optimizer_state=_under("optimizer", arrays),
        now=said["now"],
        spent=said["spent"],
        replies=[(entry["time"], entry["tie"], _reply(entry, arrays)) for entry in said["replies"]],
    )
    running.fleet.restore(_under("kept", arrays))
    controls, personal = _under("staged-control", arrays), _under("staged-personal", arrays)
    for name in controls.keys() | personal.keys():
        running.fleet.staged[name] = (controls.get(name), personal.get(name))
    history: list[Record] = said["history"]
    return history


def _under(prefix: str, arrays: dict[str, Vector]) -> dict[str, Vector]:
    start = f"{prefix}/"
    return {n.removeprefix(start): value for n, value in arrays.items() if n.startswith(start)}


def _reply(entry: dict[str, Any], arrays: dict[str, Vector]) -> Reply:
    reply = Reply(device_id=entry["device"], after_s=0.0, upload=None, reason=entry["reason"])
    if "weight" not in entry:
        return reply
    values = arrays[f"upload/{entry['device']}"]
    return replace(reply, upload=Upload(values=values, weight=entry["weight"]))
