"""What callers send and show is in no file that serving leaves behind."""

from pathlib import Path

import httpx
import numpy as np
import pytest

from minga.inference.client import InferenceClient
from minga.inference.credentials import Credentials
from minga.inference.grpc_client import GrpcClient
from minga.inference.protocol import InferRequest
from tests.cluster.watched import Processes, until
from tests.serving.monitor.test_on_ray import rows_of
from tests.serving.test_commands import project, run
from tests.serving.watched import rows, watched_model

__all__ = ["project"]

pytestmark = pytest.mark.slow

MODEL = "confided"
SECRET = np.float32(31.415926)
NAME = "patient 4711"
VISIT = "visit-0815"
MONITOR = "[serving.monitor]\nwindow_rows = 50\nflush_s = 0.2\n"


def found(folder: Path, needle: bytes) -> list[str]:
    """Name the files below a folder that hold some bytes."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 5
    return [str(file.relative_to(folder)) for file in files if needle in file.read_bytes()]


def test_inputs_and_keys_are_in_no_file(project, register, tmp_path, monkeypatch, capsys):
    """Neither are in the monitor's store, a log, or the registry, though everything is logged.

    What is kept on purpose, the answer to a request with an id, is found: so the search works.
    """
    monkeypatch.setenv("MINGA_LOG_LEVEL", "DEBUG")
    register(MODEL, 1, content=watched_model())
    folder = project()
    with (Path(folder) / "minga.toml").open("a") as file:
        file.write(MONITOR)
    run("key", "create", "ward", "--project", folder)
    key = capsys.readouterr().out.strip()
    table = rows(60, 1)
    table[:, 1] = SECRET
    shown = Credentials(key=key)
    with Processes(tmp_path / "logs") as processes:
        words = ("--project", folder, "--port", "0", "--grpc-port", "0", "--engine", "local")
        processes.minga("serving", "serve", MODEL, *words)
        url = processes.said("serving", r"ready at (http://[^;\s]+)")
        grpc_url = processes.said("serving", r"(grpc://\S+)")
        with InferenceClient(url, credentials=shown) as client:
            for is_binary in (True, False):
                request = InferRequest(inputs={"input": table}, id=VISIT, binary_outputs=is_binary)
                client.request(MODEL, request)
        with GrpcClient(grpc_url, credentials=shown) as client:
            client.infer(MODEL, {"input": table})
        told = {"Authorization": f"Bearer {key}"}
        for body in (f'{{"inputs": "{NAME}"}}', f'{{"{NAME}"', NAME):
            answer = httpx.post(f"{url}/v2/models/{MODEL}/infer", content=body, headers=told)
            assert answer.status_code == 400
        monitor = Path(folder) / ".minga" / "monitor"
        until(lambda: rows_of(monitor) == 3 * len(table), "all rows are watched")
    for needle in (key.encode(), SECRET.tobytes(), b"31.4159", NAME.encode()):
        assert found(tmp_path, needle) == []
    assert any("monitor" in file for file in found(tmp_path, VISIT.encode()))
