"""A device's local server: the published model answers over HTTP and over gRPC."""

import asyncio
import contextlib
import json
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from minga.federation.device.server import ENDPOINTS_FILE, run
from minga.federation.device.settings import DeviceSettings
from minga.inference.client import InferenceClient
from minga.inference.grpc_client import GrpcClient
from tests.federation.fleet import Fleet
from tests.serving.conftest import build_model

MODEL = build_model(
    [helper.make_node("Add", ["input", "input"], ["output"])],
    [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 2])],
    [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 2])],
)


async def test_a_published_model_answers_on_both_wires(tmp_path: Path) -> None:
    """A device with a gRPC port says where it listens, and both wires give the same answer."""
    rows = np.array([[1, 2]], np.float32)
    async with Fleet(tmp_path) as fleet:
        folder = await fleet.enrol("site-0")
        settings = DeviceSettings(folder=folder, port=0, grpc_port=0)
        device = asyncio.create_task(run(settings))
        try:
            await fleet.operator.publish_model("double", "1", MODEL)
            async with asyncio.timeout(30):
                while not (folder / ENDPOINTS_FILE).exists():
                    await asyncio.sleep(0.01)
                endpoints = json.loads((folder / ENDPOINTS_FILE).read_text())
                http = InferenceClient(endpoints["inference"])
                rpc = GrpcClient(endpoints["grpc"])
                with http, rpc:
                    for client in (http, rpc):
                        while not await asyncio.to_thread(client.ready, "double"):
                            await asyncio.sleep(0.01)
                        found = await asyncio.to_thread(client.infer, "double", {"input": rows})
                        np.testing.assert_array_equal(found["output"], rows * 2)
        finally:
            device.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await device
