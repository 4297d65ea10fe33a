"""Asking every replica of the application at once: from the host, or from one of them."""

import time
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from minga.serving.errors import HostError

APPLICATION: Final = "minga"
DEPLOYMENT: Final = "InferenceReplica"

_NEWS_S: Final = 15.0
"""How long news of replicas may take to a handle."""

_PAUSE_S: Final = 0.1

_ANSWERING: Final = ("RUNNING", "UPDATING")
"""States of replicas that take requests; while it is told of new versions, one is updating."""


def ask_all(method: str, *arguments: Any, timeout_s: float) -> list[Any]:
    """Call a method on every replica; call from a thread that runs no event loop.

    A handle hears of replicas that came or went a moment later than the controller. So they are
    asked again until as many have answered as run; the method must bear that.

    Raises:
        HostError: none is running, or one does not answer in time.
    """
    if not ray.is_initialized():  # Ray Serve would start one of its own
        raise HostError("Ray does not run here")
    heard_by = time.monotonic() + min(_NEWS_S, timeout_s)
    while True:
        try:
            answers = list(_replicas().broadcast(method, *arguments).results(timeout_s=timeout_s))
            num_running = _num_running()
            if not num_running and not answers:
                raise HostError("no replica is running")
            if answers and len(answers) >= num_running:
                return answers
            problem = HostError(f"{len(answers)} of {num_running} replicas have answered")
        except (RayError, RayServeException, TimeoutError) as error:
            problem = HostError(f"a replica does not answer: {error}")
        if time.monotonic() >= heard_by:
            raise problem
        time.sleep(_PAUSE_S)


def _num_running() -> int:
    """Say how many replicas take requests, as the controller knows it."""
    application = serve.status().applications.get(APPLICATION)
    deployment = application and application.deployments.get(DEPLOYMENT)
    states = deployment.replica_states if deployment else {}
    return sum(states.get(state, 0) for state in _ANSWERING)


def _replicas() -> Any:
    handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    if not handle.is_initialized:
        # By the environment, routers may run on a loop of their owner; this thread has none.
        handle._init(_run_router_in_separate_loop=True)
    return handle
