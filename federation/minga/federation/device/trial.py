"""What a device does with a new model, in a process: `python -m minga.federation.device.trial`.

The model goes into an idle slot, is tested and made active as on a device, and answers over the
local server. Nothing is loaded that a device does not have.

Words: the model's file, its name, its SHA-256.
"""

import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from minga.federation.device.metrics import Metrics
from minga.federation.device.slots import ModelSlots
from minga.federation.errors import PeerError
from minga.inference.app import InferenceApp
from minga.inference.errors import ModelError
from minga.inference.repository import ModelRepository
from minga.inference.trial import serve_on_trial


async def _try(path: str, name: str, sha256: str) -> str | None:
    """Serve the model; give the reason if the device refuses it."""
    with tempfile.TemporaryDirectory(prefix="minga-trial-") as folder:
        slots, models = ModelSlots(Path(folder)), ModelRepository()
        shutil.copyfile(path, slots.idle_path(name))
        try:
            slots.activate(name, "trial", bytes.fromhex(sha256))
            models.apply(slots.active())
        except (PeerError, ModelError) as error:
            return str(error)
        await serve_on_trial(InferenceApp(models, registry=Metrics().registry))
    return None


if __name__ == "__main__":
    sys.exit(asyncio.run(_try(*sys.argv[1:4])))
