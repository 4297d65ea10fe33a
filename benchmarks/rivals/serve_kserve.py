"""KServe's Python server: one worker, over HTTP and gRPC."""

from typing import Any

import kserve
from kserve.utils.utils import generate_uuid
from rivals.serve_work import GRPC_PORT, HTTP_PORT, NAME, session


class Net(kserve.Model):
    """Tensors in, tensors out."""

    def __init__(self) -> None:
        super().__init__(NAME)
        self.session = session()
        self.ready = True

    def predict(self, payload: Any, *_: Any, **__: Any) -> Any:
        """Compute rows."""
        outputs = self.session.run(None, {"input": payload.inputs[0].as_numpy()})[0]
        tensor = kserve.InferOutput(name="output", shape=list(outputs.shape), datatype="FP32")
        is_raw = payload.use_binary_outputs  # over gRPC too, if the request was
        tensor.set_data_from_numpy(outputs, binary_data=is_raw)
        return kserve.InferResponse(
            response_id=payload.id or generate_uuid(),
            model_name=NAME,
            infer_outputs=[tensor],
            use_binary_outputs=is_raw,
        )


if __name__ == "__main__":
    kserve.ModelServer(
        http_port=HTTP_PORT,
        grpc_port=GRPC_PORT,
        enable_grpc=True,
        workers=1,
        enable_latency_logging=False,
        access_log_format=None,
    ).start([Net()])
