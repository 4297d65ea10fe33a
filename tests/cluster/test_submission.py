"""Jobs on a real Ray cluster of two machines, of which one dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minga.cluster.errors import SubmissionError
from minga.cluster.project import load
from minga.cluster.stack import ray_environment
from minga.cluster.submission import Cluster as Jobs

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parents[1] / "training" / "tasks"

SETTINGS = """
task = "blobs.py:Travels"

[data]
source = "1"

[training]
num_workers = 2
min_workers = 1
epochs = 12
max_failures = 4

[gates]
max_slice_gap = 1.0
"""

TRAVELS = '''

class Travels(Blobs):
    """Takes its time, and notes whose code it runs on."""

    def metrics(self, outputs, targets):
        import minga.training

        time.sleep(0.25)
        notes = Path(NOTES)
        notes.write_text(minga.training.__path__[0])
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
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
}
"""How soon a machine is taken for dead."""


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@pytest.fixture
def two_machines(monkeypatch):
    """A cluster of two machines with one CPU each; gives it, and its dashboard."""
    for name, value in (ray_environment() | IMPATIENCE).items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    from ray.cluster_utils import Cluster

    head = {
        "num_cpus": 1,
        "include_dashboard": True,
        "dashboard_port": free_port(),
        # Another Ray on this machine may have the usual port, and jobs go through this one.
        "dashboard_agent_listen_port": free_port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, dashboard_agent_listen_port=free_port())
        yield cluster, f"http://127.0.0.1:{head['dashboard_port']}"
    finally:
        cluster.shutdown()


@pytest.fixture
def project(tmp_path):
    """A project whose Task comes with it."""
    folder = tmp_path / "plant"
    folder.mkdir()
    notes = repr(str(tmp_path / "code"))
    task = (TASKS / "blobs.py").read_text() + TRAVELS.replace("NOTES", notes)
    (folder / "blobs.py").write_text(task)
    (folder / "minga.toml").write_text(SETTINGS)
    (folder / "site.key").write_text("secret")
    return load(folder)


def minga(*words):
    """Run a command to its end."""
    command = [sys.executable, "-m", "minga.cli", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def submitted(project, address, on_line):
    """Submit `minga train`, act on what it writes, and give the exit code and the log."""
    words = ["submit", "train", "--project", str(project.directory), "--address", address]
    command = [sys.executable, "-m", "minga.cli", *words]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            lines.append(line)
            on_line(line, process)
    return process.returncode, "".join(lines)


def test_job_survives_a_machine_but_not_ctrl_c(two_machines, project, tmp_path):
    """A machine dies and the job ends well all the same; another job is cancelled by Ctrl-C.

    The code that runs there is the one that was sent; keys stay at home.
    """
    cluster, address = two_machines
    dying = list(cluster.worker_nodes)

    def kill(line, _):
        if dying and re.match(r"train +\d+/12  train_loss", line):
            cluster.remove_node(dying.pop(), allow_graceful=False)

    code, log = submitted(project, address, kill)
    assert code == 0, log
    assert not dying
    assert "blobs version 1 is" in log
    assert project.registry().get("blobs", 1).version == 1
    assert "py_modules_files" in (tmp_path / "code").read_text()
    assert not (tmp_path / "code.key").exists()
    tracker = project.tracker()
    (run,) = tracker.client.search_runs([tracker.experiment_id], "tags.`minga.step` = 'train'")
    epochs = tracker.client.get_metric_history(run.info.run_id, "train_loss")
    assert [metric.step for metric in epochs] == list(range(1, 13))

    def interrupt(line, process):
        if "starting workers" in line:
            process.send_signal(signal.SIGINT)

    (project.directory / "more.py").write_text("")  # other code: not the work that was kept
    code, log = submitted(project, address, interrupt)
    assert code == 130, log
    assert "is cancelled; what it has done is kept" in log
    listed = json.loads(minga("job", "list", "--address", address, "--json").stdout)
    assert [job["status"] for job in listed] == ["STOPPED", "SUCCEEDED"]
    (project.directory / "blobs.py").write_text("import nothing_of_this_name")
    failed = minga("submit", "--project", str(project.directory), "--address", address)
    assert failed.returncode == 11
    assert "does not import" in failed.stdout


def test_no_cluster_is_said():
    """Where nobody answers, the error names the address and what to do."""
    with pytest.raises(SubmissionError, match=r"no Ray cluster at http://127.0.0.1:9.*ray start"):
        Jobs("http://127.0.0.1:9")
