"""What Python allows: onnxruntime behind the least that answers, `http` or `grpc`, in one process.

Over HTTP uvicorn (uvloop, httptools), starlette and orjson; over gRPC grpc.aio on uvloop. It
trusts its callers, counts nothing and knows one model.
"""

import asyncio
import sys
from typing import Any

import grpc
import numpy as np
import orjson
import uvicorn
import uvloop
from rivals.serve_work import GRPC_PORT, HTTP_PORT, NAME, session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from minga.inference.protocol import JSON_SIZE_HEADER
from minga.inference.v2 import open_inference_pb2 as pb

network = session()


def compute(rows: Any) -> Any:
    """Run the network."""
    return network.run(None, {"input": rows})[0]


async def infer(request: Request) -> Response:
    """Answer JSON with JSON, and raw tensors with raw tensors."""
    body = await request.body()
    size = request.headers.get(JSON_SIZE_HEADER)
    if size is not None:
        tensor = orjson.loads(body[: int(size)])["inputs"][0]
        outputs = compute(np.frombuffer(body, "<f4", offset=int(size)).reshape(tensor["shape"]))
        raw = outputs.tobytes()
        entry = {"parameters": {"binary_data_size": len(raw)}}
    else:
        tensor = orjson.loads(body)["inputs"][0]
        outputs = compute(np.asarray(tensor["data"], np.float32).reshape(tensor["shape"]))
        raw, entry = b"", {"data": outputs.ravel()}
    entry |= {"name": "output", "datatype": "FP32", "shape": outputs.shape}
    head = orjson.dumps({"model_name": NAME, "outputs": [entry]}, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {JSON_SIZE_HEADER: str(len(head))} if raw else {}
    kind = "application/octet-stream" if raw else "application/json"
    return Response(head + raw, media_type=kind, headers=headers)


async def model_infer(request: pb.ModelInferRequest, _: Any) -> pb.ModelInferResponse:
    """Answer raw tensors with raw tensors."""
    tensor = request.inputs[0]
    outputs = compute(np.frombuffer(request.raw_input_contents[0], "<f4").reshape(tensor.shape))
    response = pb.ModelInferResponse(model_name=NAME)
    response.outputs.add(name="output", datatype="FP32", shape=outputs.shape)
    response.raw_output_contents.append(outputs.tobytes())
    return response


async def serve_grpc() -> None:
    """Answer over gRPC until ended."""
    method = grpc.unary_unary_rpc_method_handler(
        model_infer, pb.ModelInferRequest.FromString, pb.ModelInferResponse.SerializeToString
    )
    service = "inference.GRPCInferenceService"
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"ModelInfer": method}),)
    )
    server.add_insecure_port(f"127.0.0.1:{GRPC_PORT}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    if sys.argv[1] == "grpc":
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve_grpc())
    else:
        app = Starlette(routes=[Route(f"/v2/models/{NAME}/infer", infer, methods=["POST"])])
        uvicorn.run(
            app,
            host="127.0.0.1",
            port=HTTP_PORT,
            log_level="error",
            access_log=False,
            loop="uvloop",
            http="httptools",
        )
