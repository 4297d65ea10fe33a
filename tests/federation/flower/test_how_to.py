"""The how-to for Flower users, followed as it stands."""

import asyncio
import os
import re
import sys
from pathlib import Path

import numpy as np

from minga.federation.flower.folder import TRAINER
from tests.federation.fleet import Fleet
from tests.test_docs import ROOT, blocks

PAGE = ROOT / "docs" / "how-to" / "bring-a-flower-app.md"


async def test_the_app_that_is_shown_is_federated(tmp_path: Path) -> None:
    """The page's app, settings and script lead four devices to the line that all data follow."""
    for source in blocks(PAGE, "python"):
        name = re.match(r'"""(\w+\.py)', source)
        assert name
        (tmp_path / name[1]).write_text(source)
    shown, settings = blocks(PAGE, "toml")
    (tmp_path / "pyproject.toml").write_text(shown)
    (tmp_path / "minga.toml").write_text(settings)
    async with Fleet(tmp_path) as fleet:
        for site in range(4):
            options = {"project": str(tmp_path), "partition-id": str(site)}
            await fleet.add(f"site-{site}", options, trainer=TRAINER)
        script = await asyncio.create_subprocess_exec(
            sys.executable, "start.py", cwd=tmp_path, env=dict(os.environ)
        )
        async with asyncio.timeout(60):
            assert await script.wait() == 0
    slope, offset = np.load(tmp_path / "weights.npz").values()
    assert abs(slope - 3) < 0.2
    assert abs(offset - 1) < 0.2
