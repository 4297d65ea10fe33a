"""Minga as it is deployed: one coordinator process and device processes, over mutual TLS."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, Self

from harness import HERE, STOP_TIMEOUT_S

from minga.federation.device.enrolment import enrol
from minga.federation.operator import ADDRESS_FILE, OPERATOR_FOLDER, connect

START_TIMEOUT_S: Final = 120.0


class Processes:
    """A coordinator and some devices; all end with the context, whatever happens.

    Args:
        folder: Where their state and their logs go.
        num_devices: How many devices train.
    """

    def __init__(self, folder: Path, num_devices: int) -> None:
        self.folder = folder
        self.state = folder / "coordinator"
        self._num_devices = num_devices
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        """Start the coordinator, enrol the devices, start them."""
        with ExitStack() as stack:
            self.coordinator = start_coordinator(stack, self.state, self.folder)
            asyncio.run(self._enrol())
            for device in range(self._num_devices):
                start_minga(stack, self.folder / f"{name_of(device)}.log", *self._device(device))
            asyncio.run(self._connected())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes."""
        self._stack.close()

    def _device(self, device: int) -> tuple[str, ...]:
        trains = ("--trainer", "rounds_trainer:make", "--option.device", str(device))
        folder = self.folder / name_of(device)
        # Packed, updates that are the same all over would hardly travel at all.
        settled = ("--port", "0", "--allow-plain", "--compress", "never")
        return ("device", "run", "--folder", str(folder), *settled, *trains)

    async def _enrol(self) -> None:
        async with connect(self.state) as operator:
            for device in range(self._num_devices):
                token = await operator.create_token("default", 600)
                await enrol(token.token, self.folder / name_of(device), name_of(device))

    async def _connected(self) -> None:
        async with connect(self.state) as operator:
            deadline = time.monotonic() + START_TIMEOUT_S
            while (await operator.status()).num_connected < self._num_devices:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"not all devices connect; see {self.folder}")
                await asyncio.sleep(0.2)


def start_coordinator(stack: ExitStack, state: Path, logs: Path) -> subprocess.Popen[bytes]:
    """Start a coordinator on free ports and wait until it listens; it ends with the stack."""
    ports = ("--port", "0", "--enrol-port", "0", "--metrics-port", "0")
    arguments = ("coordinator", "run", "--state", str(state), *ports)
    process = start_minga(stack, logs / "coordinator.log", *arguments)
    address = state / OPERATOR_FOLDER / ADDRESS_FILE
    wait_until(address.exists, f"the coordinator does not start; see {logs}", process)
    return process


def start_minga(stack: ExitStack, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a `minga` command; it ends with the stack."""
    file = stack.enter_context(log.open("wb"))
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "minga.cli", *arguments],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    stack.callback(stop, process)
    return process


def name_of(device: int) -> str:
    """Name a device."""
    return f"device-{device:02}"


def wait_until(holds: Callable[[], bool], otherwise: str, process: subprocess.Popen[bytes]) -> None:
    """Wait for something that a process brings about.

    Raises:
        TimeoutError: it ended, or does not come to it.
    """
    deadline = time.monotonic() + START_TIMEOUT_S
    while not holds():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.05)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, and by force what it leaves behind in its session."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
