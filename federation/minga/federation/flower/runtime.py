"""flwr as far as this package uses it beside its documented names.

All of it was read in flwr 1.32.1 and 1.41.0; the tests run with the installed version.
"""

import hashlib
from typing import Final

from flwr.clientapp import ClientApp
from flwr.compat.common import recorddict_compat as legacy

__all__ = ["COORDINATOR_NODE_ID", "RUN_ID", "be_a_node", "has_client_fn", "legacy", "node_id_of"]

RUN_ID: Final = 1
COORDINATOR_NODE_ID: Final = 1


def node_id_of(name: str) -> int:
    """Give a device's node id as Flower wants it: 63 bits, the same for the same name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) >> 1


def has_client_fn(app: ClientApp) -> bool:
    """True if an app was made of a `client_fn`, which takes messages in the older form."""
    return app._call is not None


def be_a_node(node_id: int) -> None:
    """Let `Message(...)` work outside Flower's own processes: since 1.41 it asks who it is."""
    try:
        from flwr.supercore.task_identity import TaskIdentity  # noqa: PLC0415 - newer ones have it
    except ImportError:
        return
    TaskIdentity.run_id = RUN_ID
    TaskIdentity.node_id = node_id
    TaskIdentity.task_id = 1
