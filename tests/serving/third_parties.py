"""Third parties that servers are tried with: an environment of their own, and what they ask for.

It is made once per machine, as benchmarks do with rivals: their packages must not mix with ours,
and tritonclient's messages have our names.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import TensorProto

from minga.inference.engine import ModelRef
from tests.serving.conftest import identity_model, ref_of, scaling_model, sum_model

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


def programs() -> Path:
    """Give the folder of the programs of an environment that holds the third parties alone."""
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


def triton_models(folder: Path) -> list[ModelRef]:
    """Write the models that `triton_cases` counts on."""
    contents = {f"identity-{name}": identity_model(kind) for name, kind in ELEMENTS.items()}
    for name in ("scaling", "counted", "spare-http", "spare-grpc"):
        contents[name] = scaling_model(2)
    contents["sum"] = sum_model()
    return [ref_of(folder, content, name) for name, content in contents.items()]


def triton_outcomes(bin_folder: Path, http_url: str, grpc_url: str) -> dict[str, str | None]:
    """Tell what Triton's client says of each case; it runs through all in one process."""
    done = subprocess.run(
        [
            bin_folder / "python",
            HERE / "triton_cases.py",
            http_url.removeprefix("http://"),
            grpc_url.removeprefix("grpc://"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, str | None] = json.loads(done.stdout)
    return outcomes
