"""Flower as it is deployed: one SuperLink and SuperNodes, asked for runs of some rounds.

Runs in an environment that holds flwr and nothing of Minga; see `harness.Rival`. Where there was a
choice it is in Flower's favour: no TLS, state in memory, nothing installed at run time, and nodes
that stay connected between runs.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from json import loads
from pathlib import Path
from typing import Any

from harness import HERE, answer_requests
from rivals.rounds_work import Case, Runs, expected, status_bytes

APP = HERE / "rivals" / "flower_app"
BIN = Path(sys.executable).parent
NODES_TIMEOUT_S = 120.0
ROUND_TIMEOUT_S = 240.0


class Deployment:
    """A SuperLink and its nodes, on ports that were free a moment ago."""

    def __init__(self, stack: ExitStack, folder: Path, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self._folder = folder
        self._leaders: list[int] = []
        self._environment = {
            **os.environ,
            "FLWR_HOME": str(folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        port = free_port()
        self._address = f"127.0.0.1:{port}"
        (folder / "home").mkdir()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self._address}"\n'
            "insecure = true\n"
        )
        link = ("--insecure", "--disable-runtime-dependency-installation", "--port", str(port))
        self.link = self._start(stack, "superlink", "flower-superlink", *link)
        wait_for_port(port)
        for node in range(num_nodes):
            config = f"partition-id={node} num-partitions={num_nodes}"
            where = ("--insecure", "--superlink", self._address, "--port", str(free_port()))
            name = f"supernode-{node}"
            self._start(stack, name, "flower-supernode", *where, "--node-config", config)

    def _start(
        self, stack: ExitStack, name: str, program: str, *arguments: str
    ) -> subprocess.Popen[bytes]:
        log = stack.enter_context((self._folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            [BIN / program, *arguments],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,  # noqa: PLW1509 - it takes no lock
        )
        stack.callback(kill_session, process)
        self._leaders.append(process.pid)
        return process

    def signal(self, number: int) -> None:
        """Let all its processes stand still, or go on."""
        for leader in self._leaders:
            for pid in session_of(leader):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def run(self, case: Case, num_rounds: int) -> Runs:
        """Let Flower run some rounds as one run."""
        report = self._folder / f"report-{time.monotonic_ns()}.json"
        idle = sum(status_bytes(pid, "VmRSS") for pid in session_of(self.link.pid))
        for pid in session_of(self.link.pid):
            Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
        config = (
            f"num-values={case.num_values} num-rounds={num_rounds} "
            f'num-nodes={case.num_devices} report="{report}"'
        )
        command = [BIN / "flwr", "run", APP, "--run-config", config]
        started = subprocess.run(
            command, env=self._environment, check=False, capture_output=True, text=True
        )
        if started.returncode:
            raise RuntimeError(f"flwr run failed: {started.stdout} {started.stderr}")
        deadline = time.monotonic() + NODES_TIMEOUT_S + num_rounds * ROUND_TIMEOUT_S
        while not report.exists():
            if time.monotonic() > deadline or self.link.poll() is not None:
                raise RuntimeError(f"Flower does not end: {self._tail('superlink')}")
            time.sleep(0.2)
        told = loads(report.read_text(encoding="utf-8"))
        link_peak = sum(peak_of(pid) for pid in session_of(self.link.pid))
        return runs_of(told, case, num_rounds, idle, link_peak + told["peak_bytes"])

    def _tail(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(encoding="utf-8")[-2000:]


def runs_of(told: dict[str, Any], case: Case, num_rounds: int, idle: int, peak: int) -> Runs:
    """Make figures of what the ServerApp wrote down."""
    took = [end - start for start, end in zip(told["started"], told["ended"], strict=True)]
    starts = told["started"]
    right = expected(case, num_rounds)
    return Runs(
        first_s=took[0],
        rounds_s=tuple(took[1:]),
        period_s=(starts[-1] - starts[1]) / max(1, len(starts) - 2)
        if len(starts) > 2
        else took[-1],
        idle_bytes=idle,
        peak_bytes=peak,
        max_error=max(abs(told["least"] - right), abs(told["most"] - right)),
    )


def free_port() -> int:
    """Give a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + NODES_TIMEOUT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def session_of(leader: int) -> list[int]:
    """List the processes of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
            except (ProcessLookupError, PermissionError):
                continue
    return found


def peak_of(pid: int) -> int:
    """Give a process's highest memory, 0 if it is gone."""
    try:
        return status_bytes(pid, "VmHWM")
    except (OSError, KeyError):
        return 0


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started."""
    for pid in session_of(process.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def die_with_parent() -> None:
    """End the process that this one becomes, should this one's parent be killed (prctl(2))."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@contextmanager
def deployments() -> Iterator[Any]:
    """Give what answers requests; one deployment stands at a time."""
    stack = ExitStack()
    standing: list[Deployment] = []

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        for deployment in standing:
            deployment.signal(signal.SIGSTOP if request.get("pause") else signal.SIGCONT)
        if request.get("pause"):
            return {}
        case = Case(num_devices=request["num_devices"], num_values=request["num_values"])
        if not standing or standing[0].num_nodes != case.num_devices:
            stack.close()
            standing.clear()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flower-")))
            standing.append(Deployment(stack, folder, case.num_devices))
        return asdict(standing[0].run(case, request["num_rounds"]))

    with stack:
        yield answer


def leave(number: int, _frame: object) -> None:
    """Leave through all `finally` blocks."""
    sys.exit(128 + number)


def main(_arguments: Sequence[str] = ()) -> None:
    """Answer until whoever asks is gone."""
    signal.signal(signal.SIGTERM, leave)
    with deployments() as answer:
        answer_requests(answer)


if __name__ == "__main__":
    main()
