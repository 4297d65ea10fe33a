"""`minga serve` and `minga predict`: what a user types, sees, and gets as exit code."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minga.cli.app import main
from minga.inference.client import InferenceClient
from minga.inference.credentials import Credentials
from minga.inference.errors import RejectedError
from minga.inference.grpc_client import GrpcClient
from minga.inference.server import listen


@pytest.fixture
def url(make_app, models, serve):
    """A real server with a model that doubles, and one with two inputs."""
    with serve(make_app(scaling=models["scaling"](2), sum=models["sum"]())) as address:
        yield address


def exit_code(*words: str) -> int:
    """Run a command that is to fail, and give its exit code."""
    with pytest.raises(SystemExit) as ending:
        main(list(words))
    return ending.value.code


@contextlib.contextmanager
def typed(monkeypatch, text: str):
    """Let a command find this text on its standard input."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        yield


def run(*words: str) -> None:
    """Run a command that is to succeed."""
    with contextlib.suppress(SystemExit):
        main(list(words))


def test_predict_shows_a_line_per_row(url, tmp_path, capsys):
    """The outputs of a CSV's rows come as a table."""
    file = tmp_path / "rows.csv"
    file.write_text("a,b,c\n1,2,3\n0.5,0,-1\n")
    run("predict", "scaling", "--csv", str(file), "--url", url)
    table = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert table[0] == ["row", "output"]
    assert table[-2:] == [["0", "2", "4", "6"], ["1", "1", "0", "-2"]]


@pytest.mark.parametrize("words", [["--grpc"], []], ids=["flag", "scheme"])
def test_predict_over_grpc(*, words, make_app, models, serve, capsys, monkeypatch):
    """A gRPC URL, with or without the flag, is asked over gRPC with the same answer."""
    app = make_app(scaling=models["scaling"](2))
    with serve(app, grpc=True) as url, typed(monkeypatch, "[[1, 2, 3]]"):
        run("predict", "scaling", "--input", "-", "--url", url, "--json", *words)
    answer = json.loads(capsys.readouterr().out)
    assert answer["outputs"] == {"output": [[2, 4, 6]]}


def test_predict_over_grpc_says_what_is_wrong(capsys):
    """No server, and the URL of another wire, are one line with a remedy and an exit code."""
    assert exit_code("predict", "a", "--csv", "x", "--url", "grpc://127.0.0.1:1") == 23
    assert "minga serve --grpc-port" in capsys.readouterr().err
    words = ("--grpc", "--url", "http://127.0.0.1:8000")
    assert exit_code("predict", "a", "--csv", "x", *words) == 20
    assert "grpc://127.0.0.1:8001" in capsys.readouterr().err


def test_predict_writes_json_and_nothing_else(url, capsys, monkeypatch):
    """With --json, stdout is one JSON object with the answering version."""
    with typed(monkeypatch, "[[1, 2, 3]]"):
        run("predict", "scaling", "--input", "-", "--url", url, "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer == {
        "model_name": "scaling",
        "model_version": "1",
        "outputs": {"output": [[2, 4, 6]]},
    }


def test_predict_takes_inputs_by_name(url, capsys, monkeypatch):
    """A model with several inputs is asked with an object of rows."""
    with typed(monkeypatch, '{"left": [[3, 4]], "right": [[1, 1]]}'):
        run("predict", "sum", "--input", "-", "--url", url, "--json")
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert outputs == {"sum": [[4, 5]], "difference": [[2, 3]]}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        pytest.param(["scaling"], 25, "--input FILE or --csv FILE", id="no-file"),
        pytest.param(["scaling", "--input", "gone.json"], 25, "cannot read gone.json", id="gone"),
        pytest.param(["unknown", "--input", "rows.json"], 24, "no model 'unknown'", id="model"),
        pytest.param(["scaling", "--csv", "rows.json"], 25, "is no FP32", id="json-as-csv"),
        pytest.param(["scaling", "--input", "wide.json"], 24, "must have shape", id="shape"),
    ],
)
def test_predict_says_what_is_wrong(*, words, code, message, url, tmp_path, capsys, monkeypatch):
    """Each mistake is one line with its own exit code, and no traceback."""
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text("[1, 2, 3]")
    Path("wide.json").write_text("[1, 2, 3, 4]")
    assert exit_code("predict", *words, "--url", url) == code
    complaint = capsys.readouterr().err
    assert message in complaint
    assert "Traceback" not in complaint


def test_predict_without_a_server_says_so(capsys):
    """An unreachable server is one line with a remedy and its own exit code."""
    assert exit_code("predict", "a", "--csv", "x", "--url", "http://127.0.0.1:1") == 23
    assert "is `minga serve` running" in capsys.readouterr().err


@pytest.fixture
def project(tmp_path, registry_uri, monkeypatch):
    """A project folder whose registry is the session's."""
    monkeypatch.setenv("MINGA_TRACKING_URI", registry_uri)
    folder = tmp_path / "project"
    folder.mkdir()

    def configure(**serving) -> str:
        table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in serving.items())
        (folder / "minga.toml").write_text(
            f'task = "task.py:T"\n[data]\nsource = "data.csv"\n[serving]\n{table}'
        )
        return str(folder)

    return configure


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "local"])
def test_a_taken_port_ends_serve_at_once(engine, project, register, capsys):
    """The port is checked before anything starts; the message names it."""
    register(f"taken-{engine}", 1)
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        folder = project(port=port)
        words = ("serve", f"taken-{engine}", "--project", folder, "--engine", engine)
        assert exit_code(*words) == 22
    assert f"port {port} on 127.0.0.1 is in use" in capsys.readouterr().err


@pytest.mark.slow
def test_serving_without_a_champion_says_what_to_run(project, capsys):
    """A model that nobody registered is one line with a remedy and its own exit code."""
    assert exit_code("serve", "nobody", "--project", project()) == 27
    assert "`minga run`" in capsys.readouterr().err


def test_serving_without_a_registry_says_what_to_run(tmp_path, monkeypatch, capsys):
    """Before the first run there is no registry, and serving does not make one."""
    monkeypatch.setenv("MINGA_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    assert exit_code("serve") == 27
    assert "`minga run`" in capsys.readouterr().err


@pytest.mark.slow
def test_an_unreachable_registry_ends_serve(tmp_path, monkeypatch, capsys):
    """A registry server that is away is one line with a remedy and its own exit code."""
    monkeypatch.setenv("MINGA_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.chdir(tmp_path)
    assert exit_code("serve") == 28
    assert "MINGA_TRACKING_URI" in capsys.readouterr().err


@contextlib.contextmanager
def running_serve(*words: str):
    """Run `minga serve` in a process of its own; give it and the URLs that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "minga.cli", "serve", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("ready at"):
                break
        else:
            pytest.fail(f"serve ended with {process.wait()} before it was ready")
        grpc_url = re.search(r"grpcs?://\S+", printed)
        url = re.search(r"ready at (https?://[^;]+)", printed)[1]
        yield process, url, grpc_url and grpc_url.group()
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "serving"),
    [("on-local", ["--engine", "local"], {}), ("on-ray", [], {"cpus_per_replica": 0.5})],
)
def test_serve_follows_the_champion_and_stops_cleanly(
    *, name, words, serving, project, register, load, pem, capsys
):
    """The command serves the champion to who has a key, swaps under load, and ends on SIGTERM."""
    register(name, 1)
    folder = project(port=0, poll_interval_s=0.1, **serving)
    run("key", "create", "test", "--project", folder)
    shown = Credentials(key=capsys.readouterr().out.strip(), ca=pem.ca)
    words = ["--project", folder, "--grpc-port", "0", *words]
    words += ["--tls-certificate", str(pem.server), "--tls-key", str(pem.server_key)]
    rows = np.ones((1, 3), np.float32)
    with running_serve(name, *words) as (process, url, grpc_url):
        assert url.startswith("https:")
        stranger = InferenceClient(url, credentials=Credentials(ca=pem.ca))
        with stranger, pytest.raises(RejectedError, match="wants an API key"):
            stranger.infer(name, {"input": rows})
        with load(url, model=name, credentials=shown) as callers:
            callers.wait_for(1.0)
            register(name, 2)
            callers.wait_for(2.0)
        with GrpcClient(grpc_url, credentials=shown) as client:
            assert client.infer(name, {"input": rows})["output"].tolist() == [[2, 2, 2]]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert callers.failures == []


@pytest.mark.slow
def test_ctrl_c_is_how_one_ends_serving(project, register):
    """Ctrl-C ends the command without an error, and the port is free again."""
    register("interrupted", 3)
    with running_serve("interrupted", "--project", project(port=0), "--engine", "local") as (
        process,
        url,
        grpc_url,
    ):
        assert grpc_url is None
        with InferenceClient(url) as client:
            rows = np.ones((1, 3), np.float32)
            assert client.infer("interrupted", {"input": rows})["output"].tolist() == [[3, 3, 3]]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    listen("127.0.0.1", int(url.rsplit(":", 1)[1])).close()
