"""Real processes of Minga, and the real Prometheus and Alertmanager that watch them, for tests."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import orjson
import pytest
from numpy.typing import NDArray

from minga.cluster import observability
from minga.federation.device.enrolment import enrol
from minga.federation.operator import Operator, connect
from tests.federation.fleet import TRAINERS

PATIENCE_S = 180.0


def program(name: str) -> str:
    """Find one of Debian's programs; without it the test is skipped, in CI it fails."""
    found = shutil.which(name)
    if found is None:
        words = f"{name} is not installed; .ci/install-programs does that"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    return found


def free_port() -> int:
    """Give a port that nobody has at the moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def until(
    holds: Callable[[], Any],
    what: str,
    patience_s: float = PATIENCE_S,
    seen: Callable[[], Any] = str,
) -> Any:
    """Wait until something is true, and give it; else tell what was seen instead."""
    deadline = time.monotonic() + patience_s
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited in vain: {what} {seen()}"
        time.sleep(0.05)
    return found


class Processes(contextlib.AbstractContextManager["Processes"]):
    """Processes with their output in a folder; all end with the context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *words: str, cwd: Path | None = None) -> None:
        """Run a program."""
        self.folder.mkdir(parents=True, exist_ok=True)
        folders = [str(TRAINERS), *filter(None, [os.environ.get("PYTHONPATH")])]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def minga(self, name: str, *words: str) -> None:
        """Run a command of Minga."""
        self.start(name, sys.executable, "-m", "minga.cli", *words)

    def said(self, name: str, pattern: str) -> str:
        """Wait until a process writes a pattern; give its group."""

        def look() -> re.Match[str] | None:
            text = (self.folder / f"{name}.log").read_text()
            assert self.running[name].poll() is None, f"{name} ended: {text[-2000:]}"
            return re.search(pattern, text)

        return str(until(look, f"{name} says {pattern}")[1])

    def stop(self, name: str, how: int = signal.SIGTERM) -> None:
        """End a process."""
        process = self.running.pop(name)
        process.send_signal(how)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __exit__(self, *_: object) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for name in list(self.running):
            self.stop(name)


def fast(folder: Path) -> None:
    """Let what `minga observe` wrote scrape, alert and tell within a second."""
    for name, changes in {
        "prometheus.yml": {"15s": "1s"},
        "rules/alerts.yml": {"for: 1m\n": "for: 0s\n"},
        "alertmanager.yml": {
            "group_wait: 10s": "group_wait: 100ms",
            "interval: 1m": "interval: 1s",
        },
    }.items():
        text = (folder / name).read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)


class Prometheus:
    """Prometheus, started in a folder of `minga observe`."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        processes.start(
            "prometheus",
            *(program("prometheus"), "--config.file=prometheus.yml", "--storage.tsdb.path=data"),
            f"--web.listen-address={self.url.removeprefix('http://')}",
            cwd=folder,
        )
        until(lambda: self._answers("/-/ready"), "Prometheus is ready")

    def _answers(self, path: str) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(self.url + path).is_success
        return False

    def ask(self, query: str) -> list[tuple[Mapping[str, str], float]]:
        """Run a query; give its samples that are numbers."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}).json()
        assert answer["status"] == "success", answer
        samples = [(each["metric"], float(each["value"][1])) for each in answer["data"]["result"]]
        return [(labels, value) for labels, value in samples if value == value]  # noqa: PLR0124

    def targets(self) -> dict[str, str]:
        """Tell what is scraped and how that goes: job/instance -> `up`, or what is wrong."""
        answer = httpx.get(f"{self.url}/api/v1/targets").json()
        return {
            f"{each['labels']['job']}/{each['labels']['instance']}": each["lastError"]
            or each["health"]
            for each in answer["data"]["activeTargets"]
        }


def alertmanager(processes: Processes, folder: Path, port: int) -> None:
    """Start Alertmanager in a folder of `minga observe`."""
    processes.start(
        "alertmanager",
        *(program("prometheus-alertmanager"), "--config.file=alertmanager.yml"),
        *("--storage.path=alerts", f"--web.listen-address=127.0.0.1:{port}"),
        "--cluster.listen-address=",
        cwd=folder,
    )


class LocalMinga:
    """A coordinator, devices and a central server, each a process."""

    def __init__(self, processes: Processes, folder: Path) -> None:
        self.processes = processes
        self.folder = folder
        self.state = folder / "coordinator"
        self.urls: dict[str, str] = {}
        ports = ("--port", "0", "--enrol-port", "0", "--metrics-port", "0")
        processes.minga("coordinator", "coordinator", "run", "--state", str(self.state), *ports)
        url = processes.said("coordinator", r"metrics: (http://\S+)/metrics")
        self.urls["coordinator"] = url

    def operate(self, act: Callable[[Operator], Any]) -> Any:
        """Do something as the coordinator's operator."""

        async def connected() -> Any:
            async with connect(self.state) as operator:
                return await act(operator)

        return asyncio.run(connected())

    def add_devices(self, *names: str) -> None:
        """Enrol devices and run them, with a trainer whose update is known."""
        for name in names:
            token = self.operate(lambda operator: operator.create_token("default", 600))
            asyncio.run(enrol(token.token, self.folder / name, name))
            words = ("device", "run", "--folder", str(self.folder / name), "--port", "0")
            trainer = ("--trainer", "constant_trainer:make", "--option.step", "0.01")
            self.processes.minga(name, *words, *trainer)
        for name in names:
            file = self.folder / name / "endpoints.json"
            until(file.exists, f"{name} runs")
            self.urls[name] = json.loads(file.read_text())["inference"]


def observe(folder: Path, minga: LocalMinga, *, url: str, token_file: Path) -> int:
    """Write the files of `minga observe` for running processes; gives Alertmanager's port."""
    hosts = {name: url.removeprefix("http://") for name, url in minga.urls.items()}
    port = free_port()
    devices = {name: host for name, host in hosts.items() if name not in ("coordinator", "serving")}
    targets = observability.Targets(
        serving=(hosts["serving"],),
        coordinator=(hosts["coordinator"],),
        devices=devices,
        respond=(url.removeprefix("http://").removesuffix("/alerts"),),
        alertmanager=(f"127.0.0.1:{port}",),
    )
    observability.write(folder, targets, url=url, token_file=token_file)
    fast(folder)
    return port


@contextlib.contextmanager
def asked(urls: Mapping[str, str], model: str, table: NDArray[np.float32]) -> Iterator[None]:
    """Ask servers about rows, rightly and wrongly in turn, for as long as the context lasts."""
    stop = threading.Event()
    tensor = {"name": "input", "shape": table.shape, "datatype": "FP32", "data": table.tolist()}
    bodies = [orjson.dumps({"inputs": [tensor]}), b"{}"]

    def ask() -> None:
        with httpx.Client() as client:
            while not stop.wait(0.05):
                for url in urls.values():
                    for body in bodies:
                        with contextlib.suppress(httpx.TransportError):
                            client.post(f"{url}/v2/models/{model}/infer", content=body)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
