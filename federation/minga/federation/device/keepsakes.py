"""What a device keeps for itself from round to round: personal tensors and its control variate.

What a round changes is written down under the round's name before the update leaves the device, and
takes effect only when the coordinator says that the update counted. So the device's own state and
the global one never part, whichever of both is killed in between: a device that comes back with a
pending round asks how it ended.
"""

import logging
import re
from pathlib import Path
from typing import Final

from minga.federation.durable import PRIVATE, replace_file, sync_folder
from minga.federation.errors import PeerError
from minga.federation.identity import is_name
from minga.federation.parameters import Parameters, from_bytes, to_bytes

_log = logging.getLogger(__name__)

_HEX = re.compile(r"[0-9a-f]{1,64}")
_PENDING: Final = "pending-"
_PERSONAL: Final = "personal"
_CONTROL: Final = "control"
_SUFFIX: Final = ".safetensors"


class Keepsakes:
    """The files of one device, in a folder that only its owner reads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder

    @property
    def pending(self) -> str:
        """The round whose end this device waits for; empty if there is none."""
        names = sorted(path.stem for path in self._folder.glob(f"{_PENDING}*{_SUFFIX}"))
        return names[0].removeprefix(_PENDING) if names else ""

    def personal(self, model_name: str) -> Parameters:
        """Give the personal tensors of a model; none if there are none yet.

        Raises:
            PeerError: it cannot be a model's name.
        """
        return self._read(self._path(_PERSONAL, model_name))

    def control(self, campaign_id: str) -> Parameters:
        """Give this device's control variate in a campaign; none if there is none yet.

        Raises:
            PeerError: it cannot be a campaign's name.
        """
        return self._read(self._path(_CONTROL, campaign_id))

    def stage(
        self,
        round_id: str,
        *,
        model_name: str,
        personal: Parameters,
        campaign_id: str,
        control: Parameters,
    ) -> None:
        """Write down what is to be kept if the round counts this device's update.

        Raises:
            PeerError: a name cannot be one.
            OSError: the disk fails.
        """
        kept = {
            **{f"{_PERSONAL}/{model_name}/{name}": value for name, value in personal.items()},
            **{f"{_CONTROL}/{campaign_id}/{name}": value for name, value in control.items()},
        }
        if kept:
            for kind, owner in ((_PERSONAL, model_name), (_CONTROL, campaign_id)):
                self._path(kind, owner)  # refuses what could not be settled
            self._drop_pending(but=round_id)
            replace_file(self._pending_path(round_id), to_bytes(kept), mode=PRIVATE)

    def settle(self, round_id: str, *, counted: bool) -> None:
        """Keep what a round changed, if it counted, and forget that it was pending.

        It may be done again after a crash in the middle.
        """
        if not _HEX.fullmatch(round_id) or not self._pending_path(round_id).exists():
            return
        if counted:
            self._keep(self._read(self._pending_path(round_id)))
        self._drop_pending()

    def _keep(self, staged: Parameters) -> None:
        files: dict[Path, Parameters] = {}
        for name, tensor in staged.items():
            kind, owner, own_name = name.split("/", 2)
            files.setdefault(self._path(kind, owner), {})[own_name] = tensor
        for path, tensors in files.items():
            replace_file(path, to_bytes(tensors), mode=PRIVATE)
            if path.name.startswith(_CONTROL):  # those of earlier campaigns are of no use any more
                for other in self._folder.glob(f"{_CONTROL}-*{_SUFFIX}"):
                    if other != path:
                        other.unlink()

    def _drop_pending(self, but: str = "") -> None:
        for path in self._folder.glob(f"{_PENDING}*{_SUFFIX}"):
            if path != self._pending_path(but):
                path.unlink()
        sync_folder(self._folder)

    def _pending_path(self, round_id: str) -> Path:
        if round_id and not _HEX.fullmatch(round_id):
            raise PeerError("the coordinator names a round as none can be called")
        return self._folder / f"{_PENDING}{round_id}{_SUFFIX}"

    def _path(self, kind: str, owner: str) -> Path:
        """Give the file of a model's or a campaign's tensors; a name from outside is no path."""
        if not (is_name(owner) if kind == _PERSONAL else _HEX.fullmatch(owner)):
            raise PeerError("the coordinator names a model or a campaign as none can be called")
        return self._folder / f"{kind}-{owner}{_SUFFIX}"

    def _read(self, path: Path) -> Parameters:
        try:
            return from_bytes(path.read_bytes())
        except FileNotFoundError:
            return {}
        except PeerError:
            _log.exception("%s is damaged; this device starts anew", path)
            return {}
