"""Coordinators and devices that are processes of their own, as operators and sites run them."""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from minga.federation.device.enrolment import CoordinatorAddress
from minga.federation.errors import IdentityError, UnreachableError
from minga.federation.operator import connect
from minga.federation.trainer import Scalar
from tests.federation.fleet import PATIENCE_S, TRAINERS, Fleet, add_to_path

_ASK_AGAIN_S = 0.02

DEVICE_LOG = "device.log"
"""In a device's folder: what its processes wrote, one after the other."""


async def start_device_process(
    folder: Path, options: Mapping[str, Scalar]
) -> asyncio.subprocess.Process:
    """Run an enrolled device.

    Args:
        folder: its identity folder.
        options: what its constant trainer is made with.
    """
    add_to_path(TRAINERS)
    command = ["device", "run", "--folder", folder, "--port", "0"]
    flags = [f"--option.{key}={value}" for key, value in options.items()]
    trainer = ["--trainer", "constant_trainer:make", *flags]
    with (folder / DEVICE_LOG).open("a") as log:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "minga.cli", *command, *trainer), stderr=log, stdout=log
        )


class ProcessFleet(Fleet):
    """Devices here, their coordinator in a process that can be killed."""

    async def start_coordinator(self) -> None:
        """Start the process, on the device port that it had before."""
        state = self.folder / "coordinator"
        command = f"coordinator run --port {self.ports['port']} --enrol-port 0 --metrics-port 0"
        with (self.folder / "coordinator.log").open("a") as log:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "minga.cli", *command.split(), "--state", str(state)),
                env={**os.environ, **self._environment()},
                stderr=log,
            )
        async with asyncio.timeout(PATIENCE_S):
            while not await self._is_up(state):
                await asyncio.sleep(_ASK_AGAIN_S)
        self.ports["port"] = int(self.operator.address.rpartition(":")[2])

    def _environment(self) -> dict[str, str]:
        """Give the settings as the process reads them."""
        return {f"MINGA_COORDINATOR_{k.upper()}": str(v) for k, v in self.settings.items()}

    async def enrol(self, name: str, group: str = "default") -> Path:
        """Enrol a device; gives its folder."""
        folder = await super().enrol(name, group)
        self.enrol_address = CoordinatorAddress.load(folder).enrol_address
        return folder

    async def _is_up(self, state: Path) -> bool:
        assert self.process.returncode is None, "the coordinator ended by itself"
        try:
            self.operator = await self._coordinator_stack.enter_async_context(connect(state))
            await self.operator.status()
        except (IdentityError, UnreachableError):
            await self._coordinator_stack.aclose()
            return False
        return True

    async def stop_coordinator(self) -> None:
        """Kill the process: nothing of it runs any more."""
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._coordinator_stack.aclose()

    async def until_in(self, campaign_id: str, number: int, stage: int) -> None:
        """Wait until a round is seen in a stage or past it, or the campaign has ended."""
        async with asyncio.timeout(PATIENCE_S):
            async for campaign in self.operator.watch(campaign_id):
                now = [r.stage for r in campaign.rounds if r.number >= number]
                if now and max(now) >= stage:
                    return

    async def kill_in(self, campaign_id: str, number: int, stage: int) -> None:
        """Kill the coordinator as soon as a round is seen in a stage, or past it."""
        await self.until_in(campaign_id, number, stage)
        await self.stop_coordinator()
