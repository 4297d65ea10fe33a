"""What Ray must find in the environment for the fast way in, or the plain one.

Ray Serve's own proxy is a Python process that every request and answer passes through. With
these settings HAProxy takes the requests and the replicas answer it directly.

Ray reads them when it is imported and hands them to its processes, so they must be set before.
"""

import socket
from pathlib import Path

_SWITCHES = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")


def plain_ingress() -> dict[str, str]:
    """Give the environment of the Python proxy, which listens on `ServingConfig.host` only."""
    return dict.fromkeys(_SWITCHES, "0")


def fast_ingress(folder: Path) -> dict[str, str]:
    """Give the environment of HAProxy.

    Everything that Ray Serve would put at a fixed place, where the next Ray on the machine puts
    it too, goes into `folder` and to free ports. HAProxy's statistics and metrics listen on all
    interfaces whatever the host is, and know no authentication.

    Args:
        folder: HAProxy's own, for as long as Ray runs; whoever may enter it may command HAProxy.
    """
    stats, metrics, fallback_http, fallback_grpc = _free_ports(4)
    return dict.fromkeys(_SWITCHES, "1") | {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        # Else a replica lingers for 30 s after its last request.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def _free_ports(count: int) -> list[int]:
    """Find ports that nobody has now; all are held until the last is found, so they differ."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
