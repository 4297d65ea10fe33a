"""Coordinator and device processes of the local stack: started, watched, ended by pid."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from minga.cluster.errors import StackError
from minga.federation.device.server import ENDPOINTS_FILE
from minga.federation.operator import ADDRESS_FILE, OPERATOR_FOLDER

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
_POLL_S = 0.05
_LOG_TAIL_LINES = 5


@dataclass(slots=True)
class Child:
    """One process of the stack."""

    name: str
    words: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    def kill(self) -> None:
        """End it without a warning, as a power cut would."""
        self.process.kill()
        self.process.wait()

    def log_tail(self) -> str:
        """Give the last lines that it wrote."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-_LOG_TAIL_LINES:])

    def peak_memory_bytes(self) -> int:
        """Give the most memory that it has had resident so far (Linux, `VmHWM`)."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


@dataclass(slots=True)
class LocalFleet(AbstractContextManager["LocalFleet"]):
    """One coordinator and devices on this machine, each a process; all end with the context.

    Each runs the command that a person would run. Ports are free ones.

    Args:
        folder: gets `coordinator/`, `devices/<name>/` and `logs/`.
    """

    folder: Path
    _children: dict[str, Child] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The coordinator's state folder."""
        return self.folder / "coordinator"

    def device_folder(self, name: str) -> Path:
        """A device's folder."""
        return self.folder / "devices" / name

    def start_coordinator(self, *, reconnect_grace_s: float) -> Child:
        """Start the coordinator and wait until it listens."""
        address = self.state / OPERATOR_FOLDER / ADDRESS_FILE
        address.unlink(missing_ok=True)
        words = ["coordinator", "run", "--state", str(self.state)]
        words += ["--port", "0", "--enrol-port", "0", "--metrics-port", "0"]
        words += ["--reconnect-grace", str(reconnect_grace_s)]
        child = self._start("coordinator", words)
        self._wait(child, address.exists)
        return child

    def start_device(self, name: str, *, project: Path, source: Path) -> Child:
        """Start an enrolled device and wait until its local server answers."""
        endpoints = self.device_folder(name) / ENDPOINTS_FILE
        endpoints.unlink(missing_ok=True)
        words = ["device", "run", "--folder", str(self.device_folder(name)), "--port", "0"]
        words += ["--project", str(project), "--source", str(source)]
        child = self._start(name, words)
        self._wait(child, endpoints.exists)
        return child

    def endpoint(self, name: str) -> str:
        """Give the URL of a device's local inference server."""
        endpoints = json.loads((self.device_folder(name) / ENDPOINTS_FILE).read_text())
        return str(endpoints["inference"])

    def child(self, name: str) -> Child:
        """Give a process by the name of its part."""
        return self._children[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        children = [child for child in self._children.values() if child.process.poll() is None]
        for child in children:
            child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for child in children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()

    def _start(self, name: str, words: Sequence[str]) -> Child:
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 - our own command, no shell
                [sys.executable, "-m", "minga.cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                # Ctrl-C is for the one who started all of this, and it ends them.
                start_new_session=True,
            )
        self._children[name] = child = Child(name, words, log, process)
        return child

    def _wait(self, child: Child, is_up: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_up():
            code = child.process.poll()
            if code is not None:
                raise StackError(f"{child.name} ended with code {code}:\n{child.log_tail()}")
            if time.monotonic() > deadline:
                raise StackError(
                    f"{child.name} is not up after {START_TIMEOUT_S:g} s; see {child.log}"
                )
            time.sleep(_POLL_S)
