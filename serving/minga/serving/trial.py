"""A replica as Ray Serve starts it, in a process of its own: `python -m minga.serving.trial`.

It loads a model on the path that a rollout takes (`prepare`, then `reconfigure`) and answers over
HTTP, so what a replica would refuse is refused here, before anybody depends on it.

Words: the model's file, its name, its SHA-256.
"""

import asyncio
import sys

from minga.inference.engine import ModelRef
from minga.inference.limits import Limits
from minga.inference.trial import until_released
from minga.serving.application import InferenceReplica, user_config


async def _try(path: str, name: str, sha256: str) -> str | None:
    """Serve the model; give the reason if the replica refuses it."""
    replica = InferenceReplica(Limits(num_threads=1), {"host": "127.0.0.1", "port": 0})
    wanted = user_config([ModelRef(name=name, version="trial", path=path, sha256=sha256)])
    refusal = await replica.prepare(wanted)
    if refusal is None:
        await replica.reconfigure(wanted)
        await until_released(replica.url)
        await replica.end()
    return refusal


if __name__ == "__main__":
    sys.exit(asyncio.run(_try(*sys.argv[1:4])))
