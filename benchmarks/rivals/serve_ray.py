"""Ray Serve as its documentation begins: a FastAPI ingress with one replica."""

import signal
import sys
import threading
from typing import Any

import numpy as np
import ray
from fastapi import FastAPI, Request
from ray import serve
from rivals.serve_work import HTTP_PORT, session

app = FastAPI()


@serve.deployment(max_ongoing_requests=128)
@serve.ingress(app)
class Net:
    """Rows in, rows out."""

    def __init__(self) -> None:
        self.session = session()

    @app.post("/predict")
    async def predict(self, request: Request) -> Any:
        """Compute rows."""
        rows = np.asarray((await request.json())["rows"], np.float32)
        return {"output": self.session.run(None, {"input": rows})[0].tolist()}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": HTTP_PORT})
    serve.run(Net.bind())
    threading.Event().wait()
