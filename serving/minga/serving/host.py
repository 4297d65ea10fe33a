"""Starts the Ray Serve application, and changes the versions it serves without a pause.

Everything goes through Ray Serve's declarative path, which `serve deploy` uses too: there, a
change of `user_config` reaches running replicas through `reconfigure`, where `serve.run` would
restart them all. (Ray 2.60: `serve.run` gives each deployment a random code version.)

Call from a thread that runs no event loop; Ray must be initialised.
"""

import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Final

import httpx
import ray
from ray import serve
from ray.serve.context import _get_global_client  # no public way to deploy a schema in-process
from ray.serve.schema import ServeDeploySchema

from minga.inference.client import InferenceClient
from minga.inference.comparing import Comparison
from minga.inference.engine import ModelRef
from minga.inference.server import is_everywhere, listen, take_port, url_host
from minga.serving.actors import end_actors
from minga.serving.application import IMPORT_PATH, UserConfig, user_config
from minga.serving.config import ServingConfig
from minga.serving.counting import ReplicaCounts
from minga.serving.errors import HostError, VersionRefusedError
from minga.serving.replicas import APPLICATION, DEPLOYMENT, ask_all
from minga.serving.scaling import POLICY

_POLL_S: Final = 0.1
_START_TIMEOUT_S: Final = 120
_MAX_QUESTIONS: Final = 32  # of the host to one replica, at once
_NO_PROXY: Final = "Disabled"
_QUIET: Final = {"log_level": "WARNING", "enable_access_log": False}


class ServeHost:
    """The running application. Made by `start`.

    Args:
        config: how to serve, with ports that are not 0.
        claims: hold the ports on this machine, for replicas that start later.
    """

    def __init__(self, config: ServingConfig, claims: ExitStack) -> None:
        self._config = config
        self._claims = claims
        self._reached_at = url_host(config.host)
        self._deploying = threading.Lock()

    @property
    def url(self) -> str:
        """Where clients on this machine reach the models.

        Where replicas listen on all interfaces of a cluster's machines and none is on this one,
        it is another machine with a replica.
        """
        scheme = "https" if self._config.tls_certificate else "http"
        return f"{scheme}://{self._reached_at}:{self._config.port}"

    @property
    def grpc_url(self) -> str | None:
        """Where clients on this machine reach the models over gRPC."""
        if self._config.grpc_port is None:
            return None
        scheme = "grpcs" if self._config.tls_certificate else "grpc"
        return f"{scheme}://{self._reached_at}:{self._config.grpc_port}"

    def deploy(self, refs: Sequence[ModelRef], comparisons: Sequence[Comparison] = ()) -> None:
        """Serve exactly these versions on every replica, without failing a request.

        Returns when every replica answers with them.

        Args:
            refs: the versions; of several of one model the first is its default.
            comparisons: which of them share their model's traffic.

        Raises:
            VersionRefusedError: a replica cannot load one; nothing has changed.
            HostError: the replicas do not get there in `rollout_timeout_s`.
        """
        wanted = user_config(refs, comparisons)
        with self._deploying:
            refusals = [reason for reason in self._ask_all("prepare", wanted) if reason]
            if refusals:
                raise VersionRefusedError(f"{refusals[0]}; what was served before is served still")
            self._declare(wanted)
            self._wait(
                lambda: self._is_served(wanted),
                self._config.rollout_timeout_s,
                "the new versions do not reach every replica",
            )

    def counts(self) -> list[ReplicaCounts]:
        """Give what each replica has counted of the comparisons.

        Raises:
            HostError: no replica is running, or one does not answer.
        """
        return self._ask_all("counts")

    def wait_ready(self, timeout_s: float = 30) -> None:
        """Wait until a request is answered by a model.

        Raises:
            HostError: it is not within the time.
        """
        # Nothing is sent that is secret, and the certificate need not name this machine.
        transport = httpx.HTTPTransport(verify=False)
        self._reached_at = self._find_replica()
        with InferenceClient(self.url, timeout_s=timeout_s, transport=transport) as client:
            self._wait(client.ready, timeout_s, f"no model answers at {self.url}")

    def drain(self) -> None:
        """Finish the requests in flight and end the replicas; Ray Serve ends with its Ray."""
        serve.delete(APPLICATION)
        self._let_go()

    def stop(self) -> None:
        """Finish the requests in flight, then stop Ray Serve and free its port; Ray goes on.

        Ray 2.60 writes two lines to stdout about its controller having been killed. Where Ray
        is shut down next, `drain` does the same in silence.
        """
        serve.shutdown()
        self._let_go()

    def _let_go(self) -> None:
        end_actors()
        self._claims.close()

    def _find_replica(self) -> str:
        """Give the address of a machine with a replica: this one's, if it has one."""
        if not is_everywhere(self._config.host):
            return self._reached_at
        nodes = self._ask_all("node")
        return url_host(self._config.host if _this_node() in nodes else nodes[0])

    def _launch(self) -> None:
        """Bring up replicas that serve nothing yet."""
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(proxy_location=_NO_PROXY, logging_config=_QUIET)
        self._declare(user_config([]))
        self._wait(self._is_running, _START_TIMEOUT_S, "the replicas do not start")

    def _declare(self, config: UserConfig) -> None:
        schema = {
            "applications": [application_schema(self._config, config, _placement(self._config))]
        }
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(schema))

    def _is_running(self) -> bool:
        application = serve.status().applications.get(APPLICATION)
        if application is not None and application.status == "DEPLOY_FAILED":
            raise HostError(f"Ray Serve cannot start the replicas: {application.message}")
        return application is not None and application.status == "RUNNING"

    def _is_served(self, wanted: UserConfig) -> bool:
        """Tell whether every replica answers with this; one that just died is not the last word."""
        try:
            return all(served == wanted for served in self._ask_all("served"))
        except HostError:
            return False

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method on every replica; at least one must answer."""
        return ask_all(method, *arguments, timeout_s=self._config.rollout_timeout_s)

    def _wait(self, is_done: Callable[[], bool], timeout_s: float, complaint: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_done():
            if time.monotonic() > deadline:
                raise HostError(f"{complaint} within {timeout_s:g} s; Ray Serve says: {_status()}")
            time.sleep(_POLL_S)


def start(config: ServingConfig, refs: Sequence[ModelRef]) -> ServeHost:
    """Start the application on the Ray that this process has initialised.

    Args:
        config: how to serve.
        refs: what to serve, at paths that every node of the cluster can read; may be empty, and
            `ServeHost.deploy` follow.

    Raises:
        AccessError: it would not be protected as it has to be.
        PortInUseError: the port is taken.
        VersionRefusedError: one of the versions cannot be loaded.
        HostError: the replicas do not start.
    """
    config.protection.check(config.host)
    with ExitStack() as claims:
        chosen: dict[str, int] = {}
        for name in ("port", "grpc_port"):
            if (wanted := getattr(config, name)) is not None:
                claim = claims.enter_context(claim_port(config.host, wanted))
                chosen[name] = claim.getsockname()[1]
        host = ServeHost(config.model_copy(update=chosen), claims.pop_all())
    try:
        host._launch()
        if refs:
            host.deploy(refs)
    except BaseException:
        host.stop()
        raise
    return host


def claim_port(host: str, port: int) -> socket.socket:
    """Hold a port for replicas, which share it with who holds it; choose one if any will do.

    Raises:
        PortInUseError: the port is taken.
    """
    with listen(host, port) as probe:  # a port that others share is none of ours
        number = probe.getsockname()[1]
    return take_port(host, number, shared=True)


def application_schema(
    config: ServingConfig, models: UserConfig, resources: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Write the application as an entry of a Serve config file.

    Args:
        config: how to serve.
        models: what to serve.
        resources: what else than processors each replica needs of its machine.
    """
    return {
        "name": APPLICATION,
        "route_prefix": None,  # nothing of it goes through Ray Serve's proxy
        "import_path": IMPORT_PATH,
        "args": {
            "limits": asdict(config.limits),
            "http": {"host": config.host, "port": config.port},
            "models": config.models,
            "grpc": _grpc_address(config),
            "protection": asdict(config.protection),
            "monitor": config.monitor.model_dump(),
        },
        "deployments": [
            {
                "name": DEPLOYMENT,
                **_scale(config),
                "max_ongoing_requests": _MAX_QUESTIONS,
                "graceful_shutdown_wait_loop_s": _POLL_S,
                # A replica that is replaced at all is replaced by one that runs already.
                "max_surge_percent": 100,
                "ray_actor_options": {
                    "num_cpus": config.cpus_per_replica,
                    **({"resources": dict(resources)} if resources else {}),
                },
                "logging_config": _QUIET,
                "user_config": models,
            }
        ],
    }


def serve_config(config: ServingConfig, refs: Sequence[ModelRef]) -> dict[str, Any]:
    """Write a Serve config file, by which `serve deploy` starts the same application.

    Args:
        config: how to serve.
        refs: what to serve, at paths that every node of the cluster can read.

    Raises:
        AccessError: it would not be protected as it has to be.
    """
    config.protection.check(config.host)
    return {
        "proxy_location": _NO_PROXY,
        "logging_config": _QUIET,
        "applications": [application_schema(config, user_config(refs))],
    }


def _placement(config: ServingConfig) -> dict[str, float]:
    """Keep replicas on this machine where they listen at an address of its own.

    Ray gives each machine a resource by its address; a thousandth of it is enough to be there.
    """
    return {} if is_everywhere(config.host) else {f"node:{_this_node()}": 0.001}


def _this_node() -> str:
    address: str = ray.util.get_node_ip_address()
    return address


def _scale(config: ServingConfig) -> dict[str, Any]:
    """Say how many replicas there are, or between which numbers they follow the load."""
    if config.max_replicas is None:
        return {"num_replicas": config.num_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": config.num_replicas,
            "max_replicas": config.max_replicas,
            "policy": {"policy_function": POLICY},
            "target_ongoing_requests": config.target_ongoing_requests,
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
            # The mean over a longer time than one waits for would hide what one waits for.
            "look_back_period_s": min(config.upscale_delay_s, config.downscale_delay_s, 30.0),
        }
    }


def _grpc_address(config: ServingConfig) -> dict[str, Any] | None:
    if config.grpc_port is None:
        return None
    return {"host": config.host, "port": config.grpc_port}


def _status() -> str:
    application = serve.status().applications.get(APPLICATION)
    return "nothing" if application is None else f"{application.status} {application.message}"
