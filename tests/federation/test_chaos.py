"""A coordinator that is killed at many points of many rounds, and devices with it.

`make chaos` does it at hundreds of points. A failure is repeated, as far as processes on a busy
machine repeat anything, with the seed in the test's name and the same number of points:
`pytest tests/federation/test_chaos.py --chaos-points=40 --chaos-seed=1234`.
"""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from tests.federation.chaos import LATENCY_S, ChaosFleet, Point, points_of
from tests.federation.proxy import open_proxy

pytestmark = pytest.mark.slow

FLEETS = 3
"""So many campaigns go on side by side: each mostly waits, for a start or for devices' return."""

MAX_POINTS = 100
"""In one campaign: a coordinator keeps the names of devices for its newest hundred rounds."""


async def test_killed_at_many_points(
    tmp_path: Path,
    pytestconfig: pytest.Config,
    chaos_seed: int,
) -> None:
    """All rounds end with exact sums, each device in them once and told so, by themselves."""
    count = pytestconfig.getoption("chaos_points")
    points = points_of(chaos_seed, count)
    share = min(-(-count // FLEETS), MAX_POINTS)
    hits: Counter[str] = Counter()
    at_once = asyncio.Semaphore(FLEETS)

    async def take_turn(index: int) -> None:
        mine = renumbered(points[index * share : (index + 1) * share])
        async with at_once:
            await go_through(tmp_path / f"fleet-{index}", mine, hits)

    async with asyncio.TaskGroup() as group:
        for index in range(-(-count // share)):
            group.create_task(take_turn(index))
    print(f"killed in: {dict(hits)}")  # noqa: T201 - shown where the test fails
    assert hits.total() == count
    if count >= 40:
        assert hits.keys() >= {"KEYS", "SHARES", "UPDATES", "CONFIRM", "UNMASK", "AGGREGATE"}, hits


def renumbered(points: list[Point]) -> list[Point]:
    """Let the rounds of some points begin with the first."""
    first = points[0].number - 1
    return [
        Point(number=p.number - first, stage=p.stage, delay_s=p.delay_s, victim=p.victim)
        for p in points
    ]


async def go_through(folder: Path, points: list[Point], hits: Counter[str]) -> None:
    """Take one fleet through its points."""
    folder.mkdir()
    async with open_proxy(0, latency_s=LATENCY_S) as proxy, ChaosFleet(folder, proxy) as fleet:
        try:
            await fleet.open()
            campaign = await fleet.go_through(points)
            await fleet.assert_sound(campaign)
        finally:
            hits.update(fleet.hits)
