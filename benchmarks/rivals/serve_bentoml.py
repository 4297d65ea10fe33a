"""BentoML: one worker with its array interface; adaptive batches for a heavy network."""

import os
import sys
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
from rivals.serve_work import HTTP_PORT, MAX_BATCH, session

# Without batches of its own a service takes them as an argument of its method's decorator.
_BATCHES: Any = {"batchable": True, "max_batch_size": MAX_BATCH} if MAX_BATCH > 1 else {}


@bentoml.service(workers=1, name="net")
class Net:
    """Rows in, rows out."""

    def __init__(self) -> None:
        self.session = session()

    @bentoml.api(**_BATCHES)
    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Compute rows."""
        outputs: np.ndarray = self.session.run(None, {"input": rows.astype(np.float32)})[0]
        return outputs


if __name__ == "__main__":
    program = str(Path(sys.executable).with_name("bentoml"))
    where = ["--host", "127.0.0.1", "--port", str(HTTP_PORT)]
    os.environ |= {"BENTOML_DO_NOT_TRACK": "True", "PYTHONPATH": str(Path.cwd())}
    os.execv(program, [program, "serve", "rivals.serve_bentoml:Net", *where])
