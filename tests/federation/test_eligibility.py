"""Which devices a round invites, and how a fleet comes back."""

import asyncio
from pathlib import Path

import pytest

from minga.federation import wire
from minga.federation.condition import Condition, Requirements
from minga.federation.coordinator.pacing import window_ms
from minga.federation.device import machine
from minga.federation.limits import MAX_RECONNECT_WINDOW_S
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan

GOOD = Condition(on_mains=True, idle_cpu=0.9, free_memory_bytes=1000)
ALL = Requirements(charging=True, idle=True, min_free_memory_bytes=1000)


@pytest.mark.parametrize(
    ("condition", "met"),
    [
        (GOOD, True),
        (Condition(on_mains=False, idle_cpu=0.9, free_memory_bytes=1000), False),
        (Condition(on_mains=True, idle_cpu=0.5, free_memory_bytes=1000), False),
        (Condition(on_mains=True, idle_cpu=float("nan"), free_memory_bytes=1000), False),
        (Condition(on_mains=True, idle_cpu=0.9, free_memory_bytes=999), False),
        (None, False),
    ],
)
def test_each_requirement_counts(condition: Condition | None, met: bool) -> None:
    """A device must meet all requirements; without any, every device does."""
    assert ALL.are_met_by(condition) is met
    assert Requirements(min_examples=5).are_met_by(condition)


def test_this_machine_is_measured() -> None:
    """What a device tells of itself is that of the machine which it runs on."""
    condition = machine.measure()
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < condition.free_memory_bytes < total
    assert 0 <= condition.idle_cpu <= 1


async def test_device_that_runs_on_its_battery(tmp_path: Path) -> None:
    """A round waits, and says why, until enough devices tell that they meet its requirements."""
    on_mains = {"site-3": False}

    def look() -> Condition:
        return Condition(on_mains=on_mains["site-3"], idle_cpu=1.0, free_memory_bytes=1 << 30)

    async with Fleet(tmp_path, heartbeat_interval_s=0.5) as fleet:
        for index in range(3):
            await fleet.add(f"site-{index}", {"step": 0.5}, look=lambda: GOOD)
        await fleet.add("site-3", {"step": 0.5}, look=look)
        await fleet.until(lambda devices: sum(d.connected for d in devices) == 4)
        plan = campaign_plan(
            min_cohort=4,
            expected_dropout=0.0,
            invite_timeout_s=0.2,
            requirements=wire.requirements_to_wire(Requirements(charging=True)),
        )
        campaign_id = await fleet.start_campaign(plan)
        async with asyncio.timeout(PATIENCE_S):
            async for campaign in fleet.operator.watch(campaign_id):
                if "1 more do not meet the campaign's requirements" in campaign.reason:
                    break
        assert not campaign.rounds
        on_mains["site-3"] = True
        campaign = await fleet.finish(campaign_id)
        assert list(campaign.rounds[0].survivors) == [f"site-{index}" for index in range(4)]
        devices = {d.device_id: d.condition for d in await fleet.operator.devices()}
        assert devices["site-3"].on_mains
        assert devices["site-0"].free_memory_bytes == 1000


async def test_too_few_examples(tmp_path: Path) -> None:
    """A device with too few examples leaves before it sends keys, and tells no number."""
    async with Fleet(tmp_path) as fleet:
        for index, count in enumerate((60, 70, 80, 49)):
            await fleet.add(f"site-{index}", {"step": 0.5, "num_examples": count})
        requirements = wire.requirements_to_wire(Requirements(min_examples=50))
        campaign = await fleet.finish(
            await fleet.start_campaign(campaign_plan(requirements=requirements))
        )
        (round_,) = campaign.rounds
        assert round_.stage == pb.ROUND_STAGE_COMMITTED, round_.reason
        assert list(round_.cohort) == ["site-0", "site-1", "site-2"]
        assert dict(round_.lost) == {
            "site-3": "IneligibleError on the device: the campaign asks for more examples"
        }
        assert round_.total_weight == 60 + 70 + 80


def test_window_grows_with_the_fleet() -> None:
    """The rate at which devices come back stays the same, as long as they need not wait too long.

    The coordinator's figure is per second, the window in milliseconds.
    """
    assert [window_ms(count, 200.0) for count in (0, 8, 2_000)] == [0, 40, 10_000]
    assert window_ms(10**6, 200.0) == MAX_RECONNECT_WINDOW_S * 1000


async def test_fleet_comes_back_spread_out(tmp_path: Path) -> None:
    """After a restart the devices' streams are spread over the window, and all come."""
    count, window_s, heartbeat_s = 30, 6.0, 0.5
    names = [f"site-{index}" for index in range(count)]
    async with Fleet(
        tmp_path, reconnects_per_s=count / window_s, heartbeat_interval_s=heartbeat_s
    ) as fleet:
        for name in names:
            await fleet.add(name)
        await fleet.until(lambda devices: sum(d.connected for d in devices) == count)
        # Until every device has heard how large the fleet is by now.
        await asyncio.sleep(2.5 * heartbeat_s)
        await fleet.stop_coordinator()
        await fleet.start_coordinator()
        clock = asyncio.get_running_loop().time
        start, came_at = clock(), dict[str, float]()

        def all_came(devices: list[pb.Device]) -> bool:
            for device in devices:
                if device.connected:
                    came_at.setdefault(device.device_id, clock() - start)
            return len(came_at) == count

        await fleet.until(all_came)
    times = sorted(came_at.values())
    assert times[count // 4] > window_s / 16  # if they came at once, all would have come by then
    assert times[-1] - times[0] > window_s / 2
    assert times[-1] < window_s + 15.0
    busiest = max(sum(t <= other < t + window_s / 8 for other in times) for t in times)
    assert busiest < count / 2
