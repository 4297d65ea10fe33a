"""Where a device keeps its models: two slots per model, one of them active.

A new version goes to the slot that is not active; only after its digest and its self-test hold does
`active.json` name it, in one step. So there is always a model that worked, also after a power cut
in the middle, and the version before stays at hand.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from minga.federation.durable import replace_file
from minga.federation.errors import PeerError
from minga.federation.identity import is_name
from minga.inference.engine import ModelRef, OnnxModel
from minga.inference.errors import InferenceError

_ACTIVE = "active.json"
_SLOTS = ("a", "b")


class ModelSlots:
    """The models of one device, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def active(self) -> tuple[ModelRef, ...]:
        """Give the active version of every model, by name; damaged ones are left out."""
        files = sorted(self._folder.glob(f"*/{_ACTIVE}"))
        return tuple(ref for file in files if (ref := _read(file)) is not None)

    def idle_path(self, name: str) -> Path:
        """Give the file of a model's idle slot; its folder is there.

        Raises:
            PeerError: the name cannot be a model's.
        """
        if not is_name(name):
            raise PeerError(f"{name!r} is no model name: use a-z, 0-9 and '-'")
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        active = _read(folder / _ACTIVE)
        idle = _SLOTS[0] if active is None or Path(active.path).stem == _SLOTS[1] else _SLOTS[1]
        return folder / f"{idle}.onnx"

    def activate(self, name: str, version: str, digest: bytes) -> ModelRef:
        """Test what lies in the idle slot and make it the active one.

        Raises:
            PeerError: it is not what was announced, or does not run; the active slot is untouched.
        """
        path = self.idle_path(name)
        try:
            ref = ModelRef(name=name, version=version, path=str(path), sha256=digest.hex())
            OnnxModel.load(ref)
        except InferenceError as error:
            path.unlink(missing_ok=True)
            raise PeerError(str(error)) from error
        replace_file(path.parent / _ACTIVE, json.dumps(asdict(ref)).encode())
        return ref


def _read(file: Path) -> ModelRef | None:
    """Read which slot is active; None if nothing whole is there."""
    try:
        ref = ModelRef(**json.loads(file.read_bytes()))
        # The slot is beside the file, also after the device's folder was moved.
        ref = replace(ref, path=str(file.parent / Path(ref.path).name))
        digest = hashlib.sha256(Path(ref.path).read_bytes()).hexdigest()
    except (OSError, ValueError, TypeError, InferenceError):
        return None
    return ref if digest == ref.sha256 else None
