"""Our server for `serving.py`: `local` from one process, or `ray` from one replica on Ray Serve.

Both are what `minga serve` runs, over HTTP and gRPC, with the monitor; only the registry is left
out, and the model comes from a file. What the monitor keeps lies beside it: see `monitor_folder`.
"""

import hashlib
import signal
import sys
import threading

from rivals.serve_work import GRPC_PORT, HTTP_PORT, MODEL, NAME
from serving_watched import monitor_folder

from minga.cli.services import run_service
from minga.inference.engine import ModelRef
from minga.serving.config import ServingConfig
from minga.serving.watcher import MemorySource


def main(engine: str) -> None:
    """Serve until ended."""
    digest = hashlib.sha256(MODEL.read_bytes()).hexdigest()
    refs = [ModelRef(name=NAME, version="1", path=str(MODEL), sha256=digest)]
    config = ServingConfig.model_validate({"port": HTTP_PORT, "grpc_port": GRPC_PORT})
    config = config.watched_in(monitor_folder(MODEL))
    if engine == "local":
        from minga.serving.local import serve_locally

        run_service(serve_locally(config, MemorySource(refs), refs, lambda *_: None), fast=True)
    else:
        on_ray(config, refs)


def on_ray(config: ServingConfig, refs: list[ModelRef]) -> None:
    """Serve as `minga serve` does."""
    from minga.cluster.stack import local_ray

    with local_ray(num_cpus=4):
        from minga.serving.host import start

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        host = start(config, refs)
        try:
            threading.Event().wait()
        finally:
            host.drain()


if __name__ == "__main__":
    main(sys.argv[1])
