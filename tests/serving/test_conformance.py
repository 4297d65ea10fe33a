"""Third parties against our servers: Triton's client, schemathesis, a validator of OpenAPI.

They are installed into an environment of their own, once per machine, as benchmarks do with
rivals: their packages must not mix with ours, and tritonclient's messages have our names.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from minga.inference.app import InferenceApp
from minga.inference.grpc_server import GrpcServer
from minga.inference.limits import Limits
from minga.inference.openapi import description
from minga.inference.repository import ModelRepository
from minga.inference.routes import ROUTES, find
from minga.inference.server import Server
from tests.serving import triton_cases
from tests.serving.conftest import (
    build_model,
    identity_model,
    ref_of,
    running,
    scaling_model,
    sum_model,
)
from tests.test_docs import blocks

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "third_party.txt"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minga"
ELEMENTS = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
}


@pytest.fixture(scope="module")
def third_party() -> Path:
    """The folder of the programs of an environment that holds the third parties alone."""
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = CACHE / f"third-party-{digest}-python{version}"
    with locked(CACHE / f"{folder.name}.lock"):
        if not (folder / ".installed").exists():
            install(folder)
    return folder / "bin"


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other test runs of this machine out of what is made once for all of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def install(folder: Path) -> None:
    """Make the environment; without a package index tests are skipped, and in CI they fail."""
    venv.create(folder, clear=True, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--requirement"]
    done = subprocess.run([*pip, REQUIREMENTS], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        words = f"pip cannot install the third parties of {REQUIREMENTS.name}: {said}"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    (folder / ".installed").touch()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[str, str]:
    """Servers for both wires, and what `triton_cases` counts on."""
    folder = tmp_path_factory.mktemp("models")
    contents = {f"identity-{name}": identity_model(kind) for name, kind in ELEMENTS.items()}
    for name in ("scaling", "counted", "spare-http", "spare-grpc"):
        contents[name] = scaling_model(2)
    contents["sum"] = sum_model()
    repository = ModelRepository()
    repository.apply([ref_of(folder, content, name) for name, content in contents.items()])
    app = InferenceApp(repository, limits=Limits(model_control=True))
    http, grpc = Server(app, port=0), GrpcServer(app.service, port=0)
    with running(http, grpc):
        yield http.url, grpc.url


@pytest.fixture(scope="module")
def outcomes(third_party, served) -> dict[str, str | None]:
    """What Triton's client says of each case; it runs through all in one process."""
    http, grpc = served
    done = subprocess.run(
        [
            third_party / "python",
            HERE / "triton_cases.py",
            http.removeprefix("http://"),
            grpc.removeprefix("grpc://"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("case", triton_cases.cases())
def test_tritonclient(case, outcomes):
    """Every case of the table passes with a client that knows nothing of us."""
    assert outcomes[case] is None, outcomes[case]


PAGE = HERE.parents[1] / "docs" / "how-to" / "serve-and-call-a-model.md"


@pytest.fixture(scope="module")
def page_served(tmp_path_factory) -> Iterator[dict[str, str]]:
    """Serve what the page's examples ask for; gives what stands for the addresses in them."""
    weights = np.linspace(-1, 1, 9, dtype=np.float32)
    content = build_model(
        [helper.make_node("MatMul", ["input", "weights"], ["output"])],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 9])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch"])],
        [numpy_helper.from_array(weights, "weights")],
    )
    repository = ModelRepository()
    folder = tmp_path_factory.mktemp("page")
    repository.apply([ref_of(folder, content, "shuttle-anomaly")])
    app = InferenceApp(repository)
    http, grpc = Server(app, port=0), GrpcServer(app.service, port=0)
    with running(http, grpc):
        yield {
            "127.0.0.1:8000": http.url.removeprefix("http://"),
            "127.0.0.1:8001": grpc.url.removeprefix("grpc://"),
        }


def example(language: str, word: str, addresses: dict[str, str]) -> str:
    """Give the page's block in a language that has a word, for running servers."""
    (found,) = (block for block in blocks(PAGE, language) if word in block)
    for written, real in addresses.items():
        found = found.replace(written, real)
    return found


def printed(*command: str | Path) -> str:
    """Run a program that is to succeed; give what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_pages_calls_of_curl_work(page_served):
    """Every call of the page answers without an error, and as the page shows."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    commands = example("bash", "/infer -d", page_served).replace("curl -s", "curl -sf -w '\\n'")
    assert commands.count("curl") == 4
    answer = json.loads(printed("bash", "-ec", commands).strip().splitlines()[-1])
    shown = json.loads(example("json", "model_version", page_served))
    for told in (answer, shown):
        (output,) = told["outputs"]
        assert len(output.pop("data")) == 1
    assert answer == shown


@pytest.mark.slow
def test_the_pages_program_with_tritonclient_works(page_served, third_party):
    """It prints the answer and the version, with nothing of ours installed."""
    said = printed(third_party / "python", "-c", example("python", "tritonclient", page_served))
    assert re.fullmatch(r"\[-?[\d.]+\] 1\n", said), said


@pytest.mark.slow
def test_the_pages_program_with_our_client_works(page_served):
    """Both wires give the same answer."""
    program = example("python", "GrpcClient", page_served)
    over_http, over_grpc = printed(sys.executable, "-c", program).splitlines()
    assert over_http == over_grpc
    assert over_http.startswith("{'output'")


@pytest.mark.slow
def test_schemathesis_finds_nothing(third_party, make_app, models, serve, tmp_path):
    """Requests made from the description, right and wrong ones, are answered as it says.

    Whether data fills its shape and fits the model is beyond a schema, so that what it allows
    may be refused: that one check is left out. All others are on, with 5xx among them.
    """
    options = (
        "--exclude-checks=positive_data_acceptance",
        "--phases=coverage,fuzzing",
        "--max-examples=8",
        "--generation-database=none",
        "--seed=1",
    )
    with serve(make_app(scaling=models["scaling"](2), sum=models["sum"]())) as url:
        done = subprocess.run(
            [third_party / "schemathesis", "run", f"{url}/openapi.json", *options],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.parametrize("is_open", [True, False], ids=["open", "with-keys"])
def test_the_description_is_valid_openapi(is_open, third_party, tmp_path):
    """A validator of the standard finds no fault in the description."""
    file = tmp_path / "openapi.json"
    file.write_text(json.dumps(description(is_open=is_open)))
    validator = third_party / "openapi-spec-validator"
    done = subprocess.run([validator, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_description_has_every_route():
    """What is routed is described with its method, and nothing else is."""
    described = {
        (method.upper(), path)
        for path, operations in description()["paths"].items()
        for method in operations
    }
    routed = {(route.method, route.template) for route in ROUTES if route.template != "/v2/"}
    assert described == routed
    names = [
        operation["operationId"]
        for operations in description()["paths"].values()
        for operation in operations.values()
    ]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.template)
def test_every_route_is_found_by_its_path(route):
    """A path made from a template leads to it, with the names that it holds."""
    match = find(route.template.replace("{model}", "a b").replace("{version}", "7"))
    assert match.route == route
    assert match.model == ("a b" if "{model}" in route.template else None)
    assert match.version == ("7" if "{version}" in route.template else None)
