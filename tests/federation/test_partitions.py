"""Links that go dead or break for a while, and devices whose processes are killed."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from minga.federation.v1 import federation_pb2 as pb
from tests.federation.exact import (
    WEIGHTS,
    assert_exact,
    assert_sums_exact,
    exact_options,
    exact_plan,
)
from tests.federation.fleet import PATIENCE_S, Fleet, toy_model
from tests.federation.process_fleet import start_device_process
from tests.federation.proxy import Proxy, open_proxy

pytestmark = pytest.mark.slow

NAMES = list(WEIGHTS)[:4]
FAR = NAMES[0]
"""The device whose link breaks."""

PARTITIONS = ["black hole", "cut"]

LARGE = toy_model(1_000_000)
"""Its masked update takes five chunks."""


@asynccontextmanager
async def far_fleet(folder: Path, **settings: object) -> AsyncIterator[tuple[Fleet, Proxy]]:
    """A coordinator with short heartbeats and four devices, one of them slow and behind a proxy."""
    async with (
        Fleet(folder, heartbeat_interval_s=0.4, **settings) as fleet,
        open_proxy(fleet.ports["port"]) as proxy,
    ):
        await fleet.add(FAR, exact_options(FAR, delay_s=0.5), address=proxy.address)
        for name in NAMES[1:]:
            await fleet.add(name, exact_options(name))
        yield fleet, proxy
        proxy.heal()
        await fleet.stop_device(FAR)


@pytest.fixture
async def far(tmp_path: Path) -> AsyncIterator[tuple[Fleet, Proxy]]:
    """See `far_fleet`."""
    async with far_fleet(tmp_path) as both:
        yield both


def plan() -> pb.CampaignPlan:
    """One round with all of them; one may be lost."""
    return exact_plan(cohort=len(NAMES))


def is_here(devices: list[pb.Device], name: str = FAR) -> bool:
    return any(device.device_id == name and device.connected for device in devices)


def part(proxy: Proxy, kind: str) -> None:
    """Let the link go dead, or break."""
    if kind == "cut":
        proxy.cut()
    else:
        proxy.black_hole()


async def heal_when_missed(fleet: Fleet, proxy: Proxy) -> None:
    """Let the link work again once the coordinator has noticed; the device comes by itself."""
    await fleet.until(lambda devices: not is_here(devices))
    proxy.heal()
    await fleet.until(is_here)


async def run_round(fleet: Fleet) -> pb.Round:
    """Run a campaign of one round, and check its sum."""
    campaign = await fleet.finish(await fleet.start_campaign(plan()))
    await assert_sums_exact(fleet, campaign)
    return campaign.rounds[-1]


# --- links ---


@pytest.mark.parametrize("kind", PARTITIONS)
async def test_link_breaks_while_idle(far: tuple[Fleet, Proxy], kind: str) -> None:
    """A device that was cut off between rounds is in the next one."""
    fleet, proxy = far
    await fleet.until(is_here)
    part(proxy, kind)
    await heal_when_missed(fleet, proxy)
    round_ = await run_round(fleet)
    assert list(round_.survivors) == NAMES


@pytest.mark.parametrize("kind", PARTITIONS)
async def test_link_breaks_while_training(far: tuple[Fleet, Proxy], kind: str) -> None:
    """A device that was cut off while it trained comes back with its update, which counts once."""
    fleet, proxy = far
    campaign_id = await fleet.start_campaign(plan())
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    part(proxy, kind)
    await heal_when_missed(fleet, proxy)
    campaign = await fleet.finish(campaign_id)
    await assert_exact(fleet, campaign)
    assert list(campaign.rounds[0].survivors) == NAMES


@pytest.mark.parametrize("kind", PARTITIONS)
async def test_link_breaks_in_an_upload(far: tuple[Fleet, Proxy], kind: str) -> None:
    """An upload that was cut off in the middle goes on where it was; its update counts once."""
    fleet, proxy = far
    campaign_id = await fleet.start_campaign(plan(), LARGE)
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    before = proxy.bytes_up
    await asyncio.wait_for(proxy.carried_up(10**6, then=lambda: part(proxy, kind)), PATIENCE_S)
    await heal_when_missed(fleet, proxy)
    campaign = await fleet.finish(campaign_id)
    await assert_exact(fleet, campaign, LARGE)
    (round_,) = campaign.rounds
    assert list(round_.survivors) == NAMES
    assert not round_.lost
    upload_bytes = round_.bytes_received / len(NAMES)
    assert proxy.bytes_up - before < 1.5 * upload_bytes


async def test_link_damages_what_it_carries(far: tuple[Fleet, Proxy]) -> None:
    """TLS finds one changed byte in a model, and one in an update; what was hit is sent again."""
    fleet, proxy = far
    await fleet.until(is_here)
    proxy.damage()
    campaign_id = await fleet.start_campaign(plan(), LARGE)
    await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    await asyncio.wait_for(proxy.carried_up(10**6, then=proxy.damage), PATIENCE_S)
    campaign = await fleet.finish(campaign_id)
    await assert_exact(fleet, campaign, LARGE)
    (round_,) = campaign.rounds
    assert list(round_.survivors) == NAMES
    assert not round_.lost


@pytest.mark.parametrize("kind", PARTITIONS)
async def test_link_stays_broken_too_long(tmp_path: Path, kind: str) -> None:
    """A round does not wait for ever; who was cut off hears of its end and is in the next one."""
    async with far_fleet(tmp_path, reconnect_grace_s=2.0) as (fleet, proxy):
        campaign_id = await fleet.start_campaign(plan())
        await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
        part(proxy, kind)
        campaign = await fleet.finish(campaign_id)
        await assert_exact(fleet, campaign)
        assert dict(campaign.rounds[0].lost) == {FAR: "away for more than 2 s"}
        proxy.heal()
        await fleet.until(is_here)
        following = await run_round(fleet)
        assert list(following.survivors) == NAMES


# --- processes ---


async def trainer_of(process: asyncio.subprocess.Process) -> psutil.Process:
    """Wait until a device's process trains in a child."""
    agent = psutil.Process(process.pid)
    async with asyncio.timeout(PATIENCE_S):
        while not (children := agent.children()):
            await asyncio.sleep(0.01)
    return children[0]


async def test_device_process_killed_while_training(tmp_path: Path) -> None:
    """The round ends without the device that was killed; started again it is in the next one."""
    name = NAMES[-1]
    async with Fleet(tmp_path, reconnect_grace_s=60.0) as fleet:
        folder = await fleet.enrol(name)
        process = await start_device_process(folder, exact_options(name, delay_s=600.0))
        try:
            for other in set(NAMES) - {name}:
                await fleet.add(other, exact_options(other))
            campaign_id = await fleet.start_campaign(plan())
            await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
            child = await trainer_of(process)
            process.kill()
            await process.wait()
            process = await start_device_process(folder, exact_options(name))
            campaign = await fleet.finish(campaign_id)
            await assert_exact(fleet, campaign)
            reason = "the device has no secrets of this round"
            assert dict(campaign.rounds[0].lost) == {name: reason}
            await asyncio.to_thread(child.wait, PATIENCE_S)
            await fleet.until(lambda devices: is_here(devices, name))
            following = await run_round(fleet)
            assert list(following.survivors) == NAMES
        finally:
            process.kill()
            await process.wait()


async def test_trainer_killed_while_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A device whose training process is killed withdraws, and trains in the next round again."""
    name = NAMES[-1]
    async with Fleet(tmp_path) as fleet:
        for each in NAMES:
            await fleet.add(each, exact_options(each, delay_s=0.5))
        campaign_id = await fleet.start_campaign(plan())
        await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
        async with asyncio.timeout(PATIENCE_S):
            while (pid := fleet.trainers[name].pid) is None:
                await asyncio.sleep(0.01)
        with caplog.at_level(logging.ERROR):
            psutil.Process(pid).kill()
            campaign = await fleet.finish(campaign_id)
        await assert_exact(fleet, campaign)
        assert dict(campaign.rounds[0].lost) == {name: "training failed on the device"}
        assert "the training process died" in caplog.text
        following = await run_round(fleet)
        assert list(following.survivors) == NAMES
        assert fleet.trainers[name].pid != pid
