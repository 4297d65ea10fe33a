"""Jobs and services on a real Ray cluster of two machines, of which one dies."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from minga.cli.app import main
from minga.cluster.errors import SubmissionError
from minga.cluster.project import load
from minga.cluster.stack import ray_environment
from minga.cluster.submission import Cluster as Jobs
from minga.inference.client import InferenceClient
from minga.inference.errors import InferenceError
from tests.cluster.watched import until
from tests.serving.conftest import models, register

__all__ = ["models", "register"]

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parents[1] / "training" / "tasks"

SETTINGS = """
task = "blobs.py:Travels"

[data]
source = "1"

[training]
num_workers = 2
min_workers = 1
epochs = 8
max_failures = 4

[gates]
max_slice_gap = 1.0
"""

TRAVELS = '''

class Travels(Blobs):
    """Takes its time, and notes for each epoch that a worker trains whose code it runs on."""

    def metrics(self, outputs, targets):
        import minga.training
        import ray

        notes = Path(NOTES)
        if ray.is_initialized() and ray.get_runtime_context().get_actor_id():
            time.sleep(0.25)
            with notes.open("a") as file:
                file.write(minga.training.__path__[0] + "\\n")
        if list(Path(__file__).parent.glob("*.key")):
            notes.with_suffix(".key").touch()
        return super().metrics(outputs, targets)
'''

IMPATIENCE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
}
"""How soon a machine is taken for dead, and no longer waited for."""


PATIENCE_S = 300.0
"""How long a job may take that is followed."""


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture(scope="module")
def two_machines():
    """A cluster of two machines with one CPU each, and its dashboard's address.

    A job joins the Ray that a file in Ray's folder names, which is the one of the machine that was
    started last. Tests beside this one start others: so this one has a folder of its own.
    """
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory(prefix="ray-") as own:
        for name, value in (ray_environment() | IMPATIENCE).items():
            patch.setenv(name, os.environ.get(name, value))
        from ray.cluster_utils import Cluster

        head = {
            "num_cpus": 1,
            "include_dashboard": True,
            "dashboard_port": free_port(),
            # Another Ray on this machine may have the usual port, and jobs go through this one.
            "dashboard_agent_listen_port": free_port(),
            "temp_dir": own,
        }
        cluster = Cluster(initialize_head=True, head_node_args=head)
        (Path(own) / "ray_current_cluster").write_text(cluster.address)
        try:
            cluster.add_node(num_cpus=1, dashboard_agent_listen_port=free_port())
            yield cluster, f"http://127.0.0.1:{head['dashboard_port']}"
        finally:
            cluster.shutdown()


@pytest.fixture
def project(with_database, tmp_path):
    """A project whose Task comes with it."""
    folder = tmp_path / "plant"
    folder.mkdir()
    notes = repr(str(tmp_path / "notes"))
    task = (TASKS / "blobs.py").read_text() + TRAVELS.replace("NOTES", notes)
    (folder / "blobs.py").write_text(task)
    (folder / "minga.toml").write_text(SETTINGS)
    (folder / "site.key").write_text("secret")
    return load(with_database(folder))


def minga(*words):
    """Run a command in this process; give its exit code and what it printed."""
    out, code = io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
    return code, out.getvalue()


def submitted(project, address, on_line):
    """Submit `minga train`, act on what it writes, and give the exit code and the log.

    One that does not end is ended, and fails.
    """
    words = ["submit", "train", "--project", str(project.directory), "--address", address]
    command = [sys.executable, "-m", "minga.cli", *words]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        patience = threading.Timer(PATIENCE_S, process.kill)
        patience.start()
        for line in process.stdout:
            lines.append(line)
            on_line(line, process)
        patience.cancel()
    return process.returncode, "".join(lines)


def test_cancelled_job_goes_on_though_a_machine_dies(two_machines, project, tmp_path):
    """Ctrl-C cancels a job; submitted again it goes on, and a machine that dies does not end it.

    Both are one run, in which each epoch stands once. The code that runs there is the one that was
    sent; keys stay at home.
    """
    cluster, address = two_machines

    def interrupt(line, process):
        if re.match(r"train +3/8  train_loss", line):
            process.send_signal(signal.SIGINT)

    code, log = submitted(project, address, interrupt)
    assert code == 130, log
    assert "is cancelled; what it has done is kept" in log
    dying = list(cluster.worker_nodes)

    def kill(line, _):
        if dying and re.match(r"train +5/8  train_loss", line):
            cluster.remove_node(dying.pop(), allow_graceful=False)

    code, log = submitted(project, address, kill)
    assert code == 0, log
    assert not dying
    assert "blobs version 1 is" in log
    assert project.registry().get("blobs", 1).version == 1
    places = (tmp_path / "notes").read_text().splitlines()
    assert all("py_modules_files" in place for place in places)
    assert len(places) >= 8
    assert not (tmp_path / "notes.key").exists()
    tracker = project.tracker()
    (run,) = tracker.client.search_runs([tracker.experiment_id], "tags.`minga.step` = 'train'")
    epochs = tracker.client.get_metric_history(run.info.run_id, "train_loss")
    assert [metric.step for metric in epochs] == list(range(1, 9))


def test_jobs_are_listed_followed_and_cancelled(two_machines, project):
    """A job that nobody follows is listed and can be cancelled; its failure keeps its exit code."""
    _, address = two_machines
    words = ["--project", str(project.directory), "--address", address]
    code, out = minga("submit", "tune", "--fresh", *words, "--detach")
    assert code == 0
    job = out.strip()
    assert minga("job", "cancel", job, "--address", address) == (0, f"job {job}: STOPPED\n")
    assert minga("job", "logs", job, "--address", address)[0] == 130
    listed = json.loads(minga("job", "list", "--address", address, "--json")[1])
    assert listed[0] == {
        "id": job, "status": "STOPPED", "command": "tune --fresh", "exit_code": None
    }  # fmt: skip
    (project.directory / "blobs.py").write_text("import nothing_of_this_name")
    code, out = minga("submit", *words)
    assert code == 11
    assert "does not import" in out


def test_places_that_a_cluster_cannot_reach_are_refused(two_machines, project, monkeypatch):
    """Another machine needs places that it can write to; passwords are seen there, and here too."""
    here = Jobs(two_machines[1])
    assert here.is_here
    with monkeypatch.context() as patch:
        patch.setenv("MINGA_TRACKING_URI", "postgresql://minga:hush@db/minga")
        with pytest.raises(SubmissionError, match="MINGA_TRACKING_URI holds a password"):
            here.submit(project, "run", [])
    jobs = Jobs(two_machines[1].replace("127.0.0.1", "127.1"))  # which is no loopback by name
    assert not jobs.is_here
    monkeypatch.setenv("MINGA_RAY_STORAGE", "/mnt/shared")
    with pytest.raises(SubmissionError, match="set MINGA_TRACKING_URI, MINGA_ARTIFACT_ROOT to"):
        jobs.submit(project, "run", [])
    monkeypatch.setenv("MINGA_ARTIFACT_ROOT", "s3://models")
    monkeypatch.setenv("MINGA_TRACKING_URI", "postgresql://minga:hush@db/minga")
    with pytest.raises(SubmissionError, match="MINGA_TRACKING_URI holds a password") as refused:
        jobs.submit(project, "run", [])
    assert "hush" not in str(refused.value)


def test_an_exported_file_is_deployed_by_the_dashboard(
    two_machines, register, registry_uri, tmp_path, monkeypatch
):
    """`serve deploy` takes what `minga serve --export` wrote; again, with a new version, it swaps.

    Somebody asks meanwhile and tries nothing twice, and nothing fails.
    """
    _, address = two_machines
    monkeypatch.setenv("MINGA_TRACKING_URI", registry_uri)
    monkeypatch.chdir(tmp_path)
    port, failures, stop = free_port(), [], threading.Event()
    url = f"http://127.0.0.1:{port}"

    def deploy(factor):
        register("deployed", factor)
        words = ("--port", str(port), "--export", "serve.yaml")
        assert minga("serve", "deployed", *words)[0] == 0
        command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "deploy"]
        subprocess.run(
            [*command, "serve.yaml", "--address", address],
            check=True,
            timeout=120,
            capture_output=True,
        )

    def answer(client):
        rows = {"input": np.ones((1, 3), np.float32)}
        return client.infer("deployed", rows)["output"].tolist()

    def ask():
        with InferenceClient(url, retries=0) as client:
            while not stop.wait(0.005):
                try:
                    answer(client)
                except InferenceError as error:
                    failures.append(error)

    deploy(2)
    caller = threading.Thread(target=ask)
    with InferenceClient(url) as client:
        until(lambda: client.ready("deployed"), "the model is ready")
        assert answer(client) == [[2, 2, 2]]
        caller.start()
        try:
            deploy(3)
            until(lambda: answer(client) == [[3, 3, 3]], "the new version answers")
        finally:
            stop.set()
            caller.join()
    assert failures == []


def test_no_cluster_is_said():
    """Where nobody answers, the error names the address and what to do."""
    with pytest.raises(SubmissionError, match=r"no Ray cluster at http://127.0.0.1:9.*ray start"):
        Jobs("http://127.0.0.1:9")
