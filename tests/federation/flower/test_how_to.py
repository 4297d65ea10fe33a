"""The how-to for Flower users, followed as it stands."""

import asyncio
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np

from minga.federation.device.enrolment import enrol
from minga.federation.flower.folder import TRAINER
from tests.federation.fleet import Fleet
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "how-to" / "bring-a-flower-app.md"


async def test_the_app_that_is_shown_is_federated(tmp_path: Path) -> None:
    """The page's app, settings, command and script lead four devices to the data's own line."""
    project = tmp_path / "line"
    project.mkdir()
    for source in blocks(PAGE, "python"):
        name = re.match(r'"""(\w+\.py)', source)
        assert name
        (project / name[1]).write_text(source)
    shown, settings = blocks(PAGE, "toml")
    (project / "pyproject.toml").write_text(shown)
    (project / "minga.toml").write_text(settings)
    (project / "coordinator").symlink_to(tmp_path / "coordinator")
    async with Fleet(tmp_path) as fleet, running_as_shown(fleet, "devices/3"):
        for site in range(3):
            options = {"project": str(project), "partition-id": str(site)}
            await fleet.add(f"site-{site}", options, trainer=TRAINER)
        script = await asyncio.create_subprocess_exec(sys.executable, "start.py", cwd=project)
        async with asyncio.timeout(60):
            assert await script.wait() == 0
        campaign = (await fleet.operator.status()).campaigns[0]
        assert "site-3" in campaign.rounds[-1].survivors
    slope, offset = np.load(project / "weights.npz").values()
    assert abs(slope - 3) < 0.2
    assert abs(offset - 1) < 0.2


@asynccontextmanager
async def running_as_shown(fleet: Fleet, folder: str) -> AsyncIterator[None]:
    """Run the page's command for a device, which is enrolled first."""
    command = next(line for line in blocks(PAGE, "bash") if "device run" in line)
    program, *words = shlex.split(command)
    assert program == "minga"
    assert folder in words
    token = await fleet.operator.create_token("default", 600)
    await enrol(token.token, fleet.folder / folder, "site-3")
    device = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "minga.cli", *words, "--port", "0", cwd=fleet.folder
    )
    try:
        await fleet.until(lambda devices: any(device.connected for device in devices))
        yield
    finally:
        device.terminate()
        async with asyncio.timeout(30):
            await device.wait()
