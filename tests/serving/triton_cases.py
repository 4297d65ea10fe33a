"""What Triton's client does with a server of ours; runs in an environment without Minga.

Run as `python triton_cases.py HTTP_ADDRESS GRPC_ADDRESS`; writes a JSON object with what went
wrong by case, null where nothing did. The server has the models of `third_parties.triton_models`.
"""

import itertools
import json
import sys
import traceback
from functools import partial
from queue import SimpleQueue

try:
    import numpy as np
    import tritonclient.grpc as triton_grpc
    import tritonclient.http as triton_http
    from tritonclient.utils import InferenceServerException
except ImportError:  # the tests read the names of the cases
    np = None

EXTREMES = {
    "BOOL": [[True, False], [False, True]],
    "UINT8": [[0, 255], [1, 2]],
    "UINT16": [[0, 65535], [1, 2]],
    "UINT32": [[0, 2**32 - 1], [1, 2]],
    "UINT64": [[0, 2**64 - 1], [1, 2]],
    "INT8": [[-128, 127], [1, 2]],
    "INT16": [[-32768, 32767], [1, 2]],
    "INT32": [[-(2**31), 2**31 - 1], [1, 2]],
    "INT64": [[-(2**63), 2**63 - 1], [1, 2]],
    "FP16": [[65504.0, -0.5], [0.0, 1.0]],
    "FP32": [[3.4e38, -1e-38], [0.0, 0.1]],
    "FP64": [[1.7e308, -1e-300], [0.0, 0.1]],
    "BYTES": [["", "é🦙"], ["a", "b" * 300]],
}
FORMS = ("json", "binary")
CODINGS = (None, "gzip", "deflate")


class Wire:
    """One of the client's two halves, which differ in small ways."""

    def __init__(self, kind, address):
        self.kind = kind
        self.module = triton_http if kind == "http" else triton_grpc
        self.client = self.module.InferenceServerClient(address)

    def given(self, name, array, datatype, form="binary"):
        """An input; only HTTP has a form other than raw."""
        tensor = self.module.InferInput(name, list(array.shape), datatype)
        if self.kind == "http":
            tensor.set_data_from_numpy(array, binary_data=form == "binary")
        else:
            tensor.set_data_from_numpy(array)
        return tensor

    def wanted(self, name, form="binary"):
        """An output that is asked for by name."""
        if self.kind == "http":
            return self.module.InferRequestedOutput(name, binary_data=form == "binary")
        return self.module.InferRequestedOutput(name)

    def header(self, result):
        """What an answer says beside its tensors."""
        response = result.get_response()
        if self.kind == "http":
            return response["model_name"], response["model_version"], response.get("id", "")
        return response.model_name, response.model_version, response.id

    def fields(self, described):
        """A description as plain values."""
        if self.kind == "http":
            return described
        from google.protobuf.json_format import MessageToDict

        return MessageToDict(described, preserving_proto_field_name=True)


def health(wire):
    """Live, ready, and ready models, known and unknown."""
    client = wire.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("scaling")
    assert client.is_model_ready("scaling", "1")
    assert not client.is_model_ready("scaling", "9")
    assert not client.is_model_ready("unknown")


def metadata(wire):
    """Server and model describe themselves."""
    server = wire.fields(wire.client.get_server_metadata())
    assert server["name"] == "minga"
    assert "binary_tensor_data" in server["extensions"]
    for version in ("", "1"):
        model = wire.fields(wire.client.get_model_metadata("scaling", version))
        assert model["name"] == "scaling"
        assert model["versions"] == ["1"]
        assert model["platform"] == "onnxruntime_onnx"
        [given] = model["inputs"]
        assert (given["name"], given["datatype"]) == ("input", "FP32")
        assert [int(dim) for dim in given["shape"]] == [-1, 3]


def infer(wire, *, given, wanted, version, request_coding, response_coding):
    """One of all combinations."""
    rows = np.arange(3000, dtype=np.float32).reshape(1000, 3)
    options = {}
    if wire.kind == "http":
        options = {
            "request_compression_algorithm": request_coding,
            "response_compression_algorithm": response_coding,
        }
    elif request_coding:
        options = {"compression_algorithm": request_coding}
    outputs = None if wanted == "unsaid" else [wire.wanted("output", wanted)]
    result = wire.client.infer(
        "scaling",
        [wire.given("input", rows, "FP32", given)],
        outputs=outputs,
        model_version=version,
        request_id="42",
        **options,
    )
    np.testing.assert_array_equal(result.as_numpy("output"), rows * 2)
    assert wire.header(result) == ("scaling", "1", "42")


def datatype(wire, *, name, form):
    """The extremes of a datatype come back as they went."""
    dtype = {"BYTES": object, "BOOL": bool}.get(name, name.lower().replace("fp", "float"))
    array = np.array(EXTREMES[name], dtype=dtype)
    result = wire.client.infer(
        f"identity-{name}",
        [wire.given("input", array, name, form)],
        outputs=[wire.wanted("output", form)],
    )
    answer = result.as_numpy("output")
    if name == "BYTES":
        texts = [item.decode() if isinstance(item, bytes) else item for item in answer.ravel()]
        assert texts == array.ravel().tolist()
    else:
        assert answer.dtype == array.dtype
        np.testing.assert_array_equal(answer, array)


def chosen_outputs(wire):
    """Of two outputs the one that is asked for, and both where nothing is said."""
    pair = [
        wire.given(name, np.full((1, 2), value, np.float32), "FP32")
        for name, value in (("left", 3), ("right", 1))
    ]
    one = wire.client.infer("sum", pair, outputs=[wire.wanted("difference")])
    assert one.as_numpy("difference").tolist() == [[2, 2]]
    assert one.as_numpy("sum") is None
    both = wire.client.infer("sum", pair)
    assert both.as_numpy("sum").tolist() == [[4, 4]]
    assert both.as_numpy("difference").tolist() == [[2, 2]]


def asynchronous(wire):
    """Many requests at once through the client's own concurrency."""
    arrays = [np.full((1, 3), value, np.float32) for value in range(20)]
    inputs = [[wire.given("input", array, "FP32")] for array in arrays]
    if wire.kind == "http":
        pending = [wire.client.async_infer("scaling", given) for given in inputs]
        results = [request.get_result() for request in pending]
    else:
        queue = SimpleQueue()
        for index, given in enumerate(inputs):
            done = partial(lambda index, result, error: queue.put((index, result, error)), index)
            wire.client.async_infer("scaling", given, done)
        answers = sorted((queue.get(timeout=20) for _ in inputs), key=lambda item: item[0])
        assert all(error is None for _, _, error in answers)
        results = [result for _, result, _ in answers]
    for array, result in zip(arrays, results, strict=True):
        np.testing.assert_array_equal(result.as_numpy("output"), array * 2)


def refused(wire, *, words, model="scaling", version="", name="input", shape=(1, 3), code):
    """A bad request raises the client's own error, with our words and the right status."""
    given = wire.given(name, np.zeros(shape, np.float32), "FP32")
    error = None
    try:
        wire.client.infer(model, [given], model_version=version)
    except InferenceServerException as refusal:
        error = refusal
    assert error is not None, "it was answered"
    assert words in error.message(), error.message()
    assert str(error.status()) == code, error.status()


def statistics(wire):
    """Counts grow by what was asked."""
    counts = []
    for _ in range(2):
        stats = wire.fields(wire.client.get_inference_statistics("counted"))["model_stats"][0]
        counts.append(
            (
                int(stats.get("inference_count", 0)),
                int(stats["inference_stats"]["success"].get("count", 0)),
            )
        )
        wire.client.infer("counted", [wire.given("input", np.zeros((5, 3), np.float32), "FP32")])
    assert (counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]) == (5, 1)
    every = wire.fields(wire.client.get_inference_statistics())["model_stats"]
    assert {"scaling", "counted"} <= {stats["name"] for stats in every}


def repository(wire):
    """Index, unload and load through the client."""
    client = wire.client
    index = wire.fields(client.get_model_repository_index())
    entries = index if wire.kind == "http" else index["models"]
    assert {"scaling", "sum"} <= {entry["name"] for entry in entries}
    assert all(entry["state"] == "READY" for entry in entries)
    model = f"spare-{wire.kind}"
    client.unload_model(model)
    assert not client.is_model_ready(model)
    client.load_model(model)
    assert client.is_model_ready(model)


def cases():
    """Every case by name: the wire, the function, and what is particular."""
    table = {}
    for kind in ("http", "grpc"):
        for function in (health, metadata, chosen_outputs, asynchronous, statistics, repository):
            table[f"{kind}-{function.__name__}"] = (kind, function, {})
        invalid = "400" if kind == "http" else "StatusCode.INVALID_ARGUMENT"
        unknown = "404" if kind == "http" else "StatusCode.NOT_FOUND"
        for name, fields in {
            "unknown-model": {"model": "unknown", "words": "no model", "code": unknown},
            "unknown-version": {"version": "9", "words": "no version", "code": unknown},
            "wrong-shape": {"shape": (1, 4), "words": "shape", "code": invalid},
            "wrong-rank": {"shape": (3,), "words": "shape", "code": invalid},
            "wrong-name": {"name": "other", "words": "takes inputs", "code": invalid},
        }.items():
            table[f"{kind}-{name}"] = (kind, refused, fields)
        for name in EXTREMES:
            for form in FORMS if kind == "http" and name != "FP16" else ("binary",):
                fields = {"name": name, "form": form}
                table[f"{kind}-{name}-{form}"] = (kind, datatype, fields)
    combinations = itertools.product(FORMS, (*FORMS, "unsaid"), ("", "1"), CODINGS, CODINGS)
    for given, wanted, version, request_coding, response_coding in combinations:
        name = f"http-{given}-to-{wanted}-{version or 'any'}-{request_coding}-{response_coding}"
        fields = {"given": given, "wanted": wanted, "version": version}
        codings = {"request_coding": request_coding, "response_coding": response_coding}
        table[name] = ("http", infer, fields | codings)
    for wanted, version, coding in itertools.product(("binary", "unsaid"), ("", "1"), CODINGS):
        fields = {"given": "binary", "wanted": wanted, "version": version}
        codings = {"request_coding": coding, "response_coding": None}
        table[f"grpc-to-{wanted}-{version or 'any'}-{coding}"] = ("grpc", infer, fields | codings)
    return table


def main(http_address, grpc_address):
    """Run every case, and write what went wrong."""
    wires = {"http": Wire("http", http_address), "grpc": Wire("grpc", grpc_address)}
    failures = {}
    for name, (kind, function, fields) in cases().items():
        try:
            function(wires[kind], **fields)
        except Exception:  # noqa: BLE001 - whatever it is, the test shows it
            failures[name] = traceback.format_exc(limit=-3)
        else:
            failures[name] = None
    json.dump(failures, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
