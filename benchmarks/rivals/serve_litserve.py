"""LitServe: one worker, as its documentation writes a server; batches for a heavy network."""

from typing import Any

import litserve
import numpy as np
from rivals.serve_work import HTTP_PORT, MAX_BATCH, session


class Net(litserve.LitAPI):
    """Rows in, rows out."""

    def setup(self, _device: Any) -> None:
        """Open the network, in the worker."""
        self.session = session()

    def decode_request(self, request, **_):  # a type would be taken for a form of the request
        """Read the one row of a request."""
        return np.asarray(request["rows"][0], np.float32)

    def batch(self, inputs: Any) -> Any:
        """Join rows."""
        return np.stack(inputs)

    def unbatch(self, output: Any) -> Any:
        """Part rows."""
        return list(output)

    def predict(self, x: Any, **_: Any) -> Any:
        """Compute a row, or several."""
        rows = x if x.ndim == 2 else x[None]
        outputs = self.session.run(None, {"input": rows})[0]
        return outputs if x.ndim == 2 else outputs[0]

    def encode_response(self, output: Any, **_: Any) -> Any:
        """Write the one row of an answer."""
        return {"output": [output.tolist()]}


if __name__ == "__main__":
    api = Net(max_batch_size=MAX_BATCH, batch_timeout=0.005 if MAX_BATCH > 1 else 0.0)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1)
    server.run(
        host="127.0.0.1",
        port=HTTP_PORT,
        num_api_servers=1,
        log_level="error",
        generate_client_file=False,
        access_log=False,
    )
