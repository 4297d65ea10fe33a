"""A device's part in a round, where its link or its disk fails."""

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from minga.federation.errors import UnreachableError
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.coordinator.desk import Desk
from tests.federation.fleet import campaign_plan, toy_model


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and four devices that are not connected yet."""
    desk = Desk(tmp_path)
    for index in range(4):
        desk.enrol(f"site-{index}", 1.0)
    desk.start()
    yield desk
    await desk.stop()


async def test_model_that_could_not_be_fetched(desk: Desk) -> None:
    """A device whose link broke before it had the model trains when it is asked again."""
    broken = UnreachableError("the link broke")
    # Once beside the first steps, once when the update is asked for.
    desk.devices["site-0"].download_errors = [broken, broken]
    desk.connect()
    campaign_id = desk.start_campaign(campaign_plan(), toy_model())
    await desk.until_connected(3)
    desk.connect("site-0")
    (round_,) = (await desk.finish(campaign_id)).rounds
    assert list(round_.survivors) == ["site-0", "site-1", "site-2", "site-3"]


async def test_device_whose_disk_is_full(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """An error that is nobody's withdraws at once; only the device's own log has its text."""
    caplog.set_level(logging.ERROR)
    desk.devices["site-0"].download_errors = [OSError(28, "No space left on device")]
    desk.connect()
    campaign_id = desk.start_campaign(campaign_plan(), toy_model())
    (round_,) = (await desk.finish(campaign_id)).rounds
    assert round_.stage == pb.ROUND_STAGE_COMMITTED
    assert dict(round_.lost) == {"site-0": "the device failed; its own log says why"}
    assert "No space left" in caplog.text
