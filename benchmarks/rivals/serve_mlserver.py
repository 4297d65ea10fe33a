"""MLServer: a runtime of its own kind, in its own process, which is faster than a pool of one."""

import json
import os
import sys
import tempfile
from pathlib import Path

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from rivals.serve_work import GRPC_PORT, HTTP_PORT, MAX_BATCH, NAME, session


class Net(MLModel):
    """Tensors in, tensors out."""

    async def load(self) -> bool:
        """Open the network."""
        self.session = session()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Compute rows."""
        rows = NumpyCodec.decode_input(payload.inputs[0])
        outputs = self.session.run(None, {"input": rows})[0]
        return InferenceResponse(
            model_name=self.name, outputs=[NumpyCodec.encode_output("output", outputs)]
        )


if __name__ == "__main__":
    folder = Path(tempfile.mkdtemp(prefix="minga-mlserver-"))
    settings = {
        "host": "127.0.0.1",
        "http_port": HTTP_PORT,
        "grpc_port": GRPC_PORT,
        "metrics_endpoint": None,
        "parallel_workers": 0,
        "debug": False,
    }
    model = {"name": NAME, "implementation": "rivals.serve_mlserver.Net"}
    if MAX_BATCH > 1:
        model |= {"max_batch_size": MAX_BATCH, "max_batch_time": 0.005}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "model-settings.json").write_text(json.dumps(model), encoding="utf-8")
    os.environ["PYTHONPATH"] = str(Path.cwd())
    program = str(Path(sys.executable).with_name("mlserver"))
    os.execv(program, [program, "start", str(folder)])
