"""Actors that replicas share: made by the replica that comes first, started again if they die.

An application that is deployed by Ray's own command, which ends none, finds its own again.
"""

from contextlib import suppress
from typing import Any, Final

import ray

NAMESPACE: Final = "minga"
_PREFIX: Final = "minga-"


def shared_actor(kind: type[Any], name: str, *arguments: Any) -> Any:
    """Find an actor, or make it.

    Args:
        kind: its class.
        name: what tells it from others, after a common prefix.
        arguments: of the class.
    """
    made: Any = ray.remote(kind)
    return made.options(
        name=_PREFIX + name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
    ).remote(*arguments)


def end_actors() -> None:
    """End the actors, if there are any; what they keep in folders stays there."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(_PREFIX):
            with suppress(ValueError):  # Ray's way to say that it has ended meanwhile
                ray.kill(ray.get_actor(actor["name"], namespace=NAMESPACE))
