"""Asking every replica of the application at once: from the host, or from one of them."""

from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from minga.serving.errors import HostError

APPLICATION: Final = "minga"
DEPLOYMENT: Final = "InferenceReplica"


def ask_all(method: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """Call a method on every replica; call from a thread that runs no event loop.

    Raises:
        HostError: none is running, or one does not answer in time.
    """
    if not ray.is_initialized():  # Ray Serve would start one of its own
        raise HostError("Ray does not run here")
    try:
        response = _replicas().broadcast(method, *arguments)
        answers = response.results(timeout_s=timeout_s)
    except (RayError, RayServeException, TimeoutError) as error:
        raise HostError(f"a replica does not answer: {error}") from error
    if not answers:
        raise HostError("no replica is running")
    return list(answers)


def _replicas() -> Any:
    handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    if not handle.is_initialized:
        # The fast ingress wants its routers on a loop of their owner; this thread has none.
        handle._init(_run_router_in_separate_loop=True)
    return handle
