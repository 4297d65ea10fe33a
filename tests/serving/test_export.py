"""A Serve config file that `minga serve --export` writes, deployed by Ray's own command."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from minga.inference.client import InferenceClient
from minga.inference.server import listen
from minga.serving.actors import end_actors
from tests.serving.monitor.test_on_ray import rows_of
from tests.serving.test_commands import exit_code, run
from tests.serving.test_host import replica_pids
from tests.serving.watched import rows as rows_to_watch
from tests.serving.watched import watched_model

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path, registry_uri, monkeypatch):
    """A project whose service follows its load between one replica and two."""
    monkeypatch.setenv("MINGA_TRACKING_URI", registry_uri)
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "minga.toml").write_text(
        'task = "task.py:T"\n[data]\nsource = "data.csv"\n[serving]\nmax_replicas = 2\n'
        "cpus_per_replica = 0.5\ntarget_ongoing_requests = 1.0\nupscale_delay_s = 0.5\n"
        "downscale_delay_s = 1.0\n"
    )
    return str(folder)


@pytest.fixture
def exported(project, register, models, tmp_path):
    """The file, and the port that it names."""
    register("exported", 2)
    register("yes-or-no", 1, content=watched_model())
    with listen("127.0.0.1", 0) as probe:
        port = probe.getsockname()[1]
    file = tmp_path / "serve.yaml"
    words = ("--project", project, "--port", str(port), "--export", str(file))
    run("serve", "exported", "yes-or-no", *words)
    return file, port


def wait_until(is_done, complaint: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + 60
    while not is_done():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.1)


def wait_for(count: int) -> None:
    """Wait until so many replicas are alive."""
    wait_until(lambda: len(replica_pids()) == count, f"there are not {count} replicas")


@pytest.fixture
def deployed(ray_cluster, exported):
    """What `serve run` makes of the file on the session's Ray; give its URL."""
    import ray
    from ray import serve

    file, port = exported
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run"]
    subprocess.run(
        [*command, str(file), "--address", address, "--non-blocking"],
        check=True,
        timeout=120,
        capture_output=True,
        env=os.environ,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        with InferenceClient(url) as client:
            wait_until(client.ready, f"nothing answers at {url}")
        yield url
    finally:
        serve.shutdown()
        end_actors()


def test_the_file_deploys_and_follows_the_load(deployed, project):
    """Ray's command serves it; a step of load brings a second replica, its end takes it away.

    Meanwhile somebody asks without a pause and tries nothing twice, and nothing fails. What is
    answered is watched in the project's folder, as `minga serve` does.
    """
    rows = {"input": np.ones((60_000, 3), np.float32)}  # slow enough that callers pile up
    failures: list[Exception] = []
    stop = threading.Event()

    quit_all = threading.Event()

    def call(rows: dict[str, np.ndarray], stop: threading.Event) -> None:
        with InferenceClient(deployed, retries=0) as client:
            while not stop.wait(0.002):
                try:
                    client.infer("exported", rows)
                except Exception as error:  # noqa: BLE001 - counted, whatever it is
                    failures.append(error)

    with InferenceClient(deployed) as client:
        output = client.infer("exported", {"input": rows["input"][:1]})["output"]
        assert output.tolist() == [[2, 2, 2]]
        client.infer("yes-or-no", {"input": rows_to_watch(40, 1)})
    wait_for(1)
    few = {"input": rows["input"][:1]}
    callers = [threading.Thread(target=call, args=(rows, stop)) for _ in range(6)]
    callers += [threading.Thread(target=call, args=(few, quit_all)) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        wait_for(2)
        stop.set()
        wait_for(1)
    finally:
        stop.set()
        quit_all.set()
        for caller in callers:
            caller.join()
    assert failures == []
    wait_until(lambda: rows_of(Path(project) / ".minga" / "monitor") == 40, "nobody watches")


def test_the_file_names_versions_and_their_digests(exported, project):
    """The versions of today are in it, with what their files must be."""
    file, port = exported
    config = yaml.safe_load(file.read_text())
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    model, _ = deployment["user_config"]["models"]
    assert config["proxy_location"] == "Disabled"
    assert application["args"]["http"] == {"host": "127.0.0.1", "port": port}
    assert (model["name"], len(model["sha256"])) == ("exported", 64)
    assert deployment["autoscaling_config"]["max_replicas"] == 2
    assert application["args"]["monitor"]["folder"] == str(Path(project) / ".minga" / "monitor")


def test_without_a_project_the_monitor_is_where_the_file_was_written(
    register, registry_uri, tmp_path, monkeypatch
):
    """Replicas work in folders of their own, so a file never names a folder relative to theirs."""
    monkeypatch.setenv("MINGA_TRACKING_URI", registry_uri)
    monkeypatch.chdir(tmp_path)
    register("alone", 3)
    run("serve", "alone", "--port", "8123", "--export", "alone.yaml")
    (application,) = yaml.safe_load(Path("alone.yaml").read_text())["applications"]
    assert application["args"]["monitor"]["folder"] == str(tmp_path / ".minga" / "monitor")


def test_a_file_needs_ports_and_a_place(project, register, tmp_path, capsys):
    """A port that is not chosen, and a folder that is not there, are one line each."""
    register("placed", 1)
    words = ("serve", "placed", "--project", project, "--export")
    assert exit_code(*words, str(tmp_path / "x.yaml"), "--port", "0") == 21
    assert "not 0" in capsys.readouterr().err
    assert exit_code(*words, str(tmp_path / "no" / "x.yaml")) == 21
    assert "cannot write" in capsys.readouterr().err
