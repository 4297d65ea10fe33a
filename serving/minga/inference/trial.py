"""A server that somebody starts only to see whether it comes up and answers.

It says on stdout where it listens, and ends when its stdin is closed: so it ends with whoever
started it, also if that one is killed.
"""

import asyncio
import sys

from minga.inference.app import InferenceApp
from minga.inference.server import Server

READY = "ready at "
"""What the line begins with that names the URL."""


async def serve_on_trial(app: InferenceApp) -> None:
    """Serve on a free port of this machine until stdin is closed."""
    async with Server(app, host="127.0.0.1", port=0) as server:
        await until_released(server.url)


async def until_released(url: str) -> None:
    """Say where a server listens, and wait until stdin is closed."""
    sys.stdout.write(f"{READY}{url}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
