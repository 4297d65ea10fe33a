"""Points at which a coordinator and its devices are killed, and a fleet that goes through them."""

import asyncio
import random
import re
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from minga.federation import audit
from minga.federation.certificates import load_certificate
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.campaign import Campaign
from minga.federation.coordinator.store import DATABASE_FILE, Store
from minga.federation.device.enrolment import CoordinatorAddress
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.exact import WEIGHTS, assert_exact, exact_options, exact_plan
from tests.federation.fleet import PATIENCE_S, toy_model
from tests.federation.process_fleet import DEVICE_LOG, ProcessFleet, start_device_process
from tests.federation.proxy import Proxy

STAGES = {
    pb.ROUND_STAGE_KEYS: 0.03,
    pb.ROUND_STAGE_SHARES: 0.03,
    pb.ROUND_STAGE_UPDATES: 0.25,
    pb.ROUND_STAGE_CONFIRM: 0.03,
    pb.ROUND_STAGE_UNMASK: 0.03,
    pb.ROUND_STAGE_AGGREGATE: 0.03,
    pb.ROUND_STAGE_COMMITTED: 0.03,
}
"""Stage -> how long after it is seen a kill may come, in seconds: about as long as it lasts."""

LATENCY_S = 0.005
"""Of the link between devices and coordinator, so that no stage is over in a blink."""

MODEL = toy_model(200_000)
TRAINING_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """When the coordinator is killed, and a device with it."""

    number: int
    """Of the round."""
    stage: int
    delay_s: float
    victim: str = ""

    def __str__(self) -> str:
        with_device = f" with {self.victim}" if self.victim else ""
        stage = pb.RoundStage.Name(self.stage).removeprefix("ROUND_STAGE_")
        return f"round {self.number}, {stage} + {1000 * self.delay_s:.1f} ms{with_device}"


def points_of(seed: int, count: int) -> list[Point]:
    """Spread points evenly over the stages, two or so in each round, at random moments.

    At most one device dies in a round: the cohort bears two.
    """
    chance = random.Random(seed)
    stages = [list(STAGES)[index % len(STAGES)] for index in range(count)]
    chance.shuffle(stages)
    points: list[Point] = []
    number, has_victim = 1, False
    for stage in stages:
        if points and stage <= points[-1].stage:
            number, has_victim = number + 1, False
        delay_s = 0.0 if chance.random() < 0.2 else chance.uniform(0.0, STAGES[stage])
        victim = chance.choice(list(WEIGHTS)) if chance.random() < 0.25 and not has_victim else ""
        has_victim = has_victim or bool(victim)
        points.append(Point(number=number, stage=stage, delay_s=delay_s, victim=victim))
    return points


# --- what devices were told ---

_TOLD = re.compile(r" round (\S+): (counted|committed|aborted) .*\n")


def told(log: Path) -> dict[str, str]:
    """Read how rounds ended from a device's log: `counted`, `committed` without it, `aborted`."""
    found: dict[str, str] = {}
    for round_id, result in _TOLD.findall(log.read_text()):
        assert found.setdefault(round_id, result) == result, f"{round_id} ended twice in {log}"
    return found


# --- going through them ---


class ChaosFleet(ProcessFleet):
    """Processes: a coordinator behind a slow link, and five devices."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        super().__init__(folder)
        self.proxy = proxy
        self.devices: dict[str, asyncio.subprocess.Process] = {}
        self.lost_memory: set[tuple[str, str]] = set()
        """(device, round): the device was killed and may not know how that round ended."""
        self.hits: Counter[str] = Counter()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self.proxy.port = self.ports["port"]
        return self

    async def __aexit__(self, *why: object) -> None:
        for name in self.devices:
            await self.kill_device(name)
        await super().__aexit__(*why)

    async def open(self) -> None:
        """Add the devices, which dial the proxy."""
        for name in WEIGHTS:
            folder = await self.enrol(name)
            CoordinatorAddress(
                enrol_address=self.enrol_address, device_address=self.proxy.address
            ).save(folder)
            await self.run_device(name)

    async def run_device(self, name: str) -> None:
        """Start a device's process."""
        options = exact_options(name, delay_s=TRAINING_S)
        self.devices[name] = await start_device_process(self.folder / name, options)

    async def kill_device(self, name: str) -> None:
        """Kill a device's process: nothing of it runs any more, and its child ends too."""
        process = self.devices[name]
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def strike(self, campaign_id: str, point: Point) -> str:
        """Kill at a point, and start all again; tells where the round was."""
        await self.until_in(campaign_id, point.number, point.stage)
        await asyncio.sleep(point.delay_s)
        await self.stop_coordinator()
        campaign = self.stored(campaign_id)
        if point.victim:
            await self.kill_device(point.victim)
            rounds = [record.round_id for record in campaign.records[-1:]]
            rounds += [campaign.open_round.order.round_id] if campaign.open_round else []
            self.lost_memory |= {(point.victim, round_id) for round_id in rounds}
            await self.run_device(point.victim)
        await self.start_coordinator()
        where = "between rounds"
        if campaign.open_round is not None:
            where = campaign.open_round.stage.name
        self.hits[where] += 1
        return where

    def stored(self, campaign_id: str) -> Campaign:
        """Read how far a killed coordinator was, from a copy of its file."""
        with TemporaryDirectory(prefix="minga-") as folder:
            for file in (self.folder / "coordinator").glob(f"{DATABASE_FILE}*"):
                shutil.copy(file, folder)
            store = Store(Path(folder) / DATABASE_FILE)
            row = next(row for row in store.campaigns() if row.campaign_id == campaign_id)
            campaign = Campaign.load(store, row)
            store.close()
        return campaign

    async def go_through(self, points: list[Point]) -> pb.Campaign:
        """Run a campaign and strike at each point; prints where it was."""
        plan = exact_plan(num_rounds=points[-1].number)
        campaign_id = await self.start_campaign(plan, MODEL)
        for index, point in enumerate(points, start=1):
            where = await self.strike(campaign_id, point)
            print(f"  {index:3}: {point} -> {where}")  # noqa: T201 - shown where a test fails
        return await self.finish(campaign_id)

    # --- what must hold in the end ---

    async def assert_sound(self, campaign: pb.Campaign) -> None:
        """Check sums, what devices were told, and the audit log."""
        await assert_exact(self, campaign, MODEL)
        with suppress(TimeoutError):  # the comparison below says what is missing
            async with asyncio.timeout(PATIENCE_S):
                while self.missing(campaign):
                    await asyncio.sleep(0.01)
        assert not self.missing(campaign), "these devices count and were not told so"
        assert self.told() <= self.counted(campaign), "these were told so and do not count"
        folder = self.folder / "coordinator"
        records = list(read_log(folder / DATABASE_FILE))
        audit.verify(records, load_certificate(folder / "operator" / "ca.pem"))
        ends = [r.subject for r in records if getattr(r, "kind", "") == Kind.ROUND_COMMITTED]
        committed = [r for r in campaign.rounds if r.stage == pb.ROUND_STAGE_COMMITTED]
        assert ends == [f"round/{round_.round_id}" for round_ in committed]

    def counted(self, campaign: pb.Campaign) -> set[tuple[str, str]]:
        """Give (device, round) of all that is in the model."""
        return {
            (name, round_.round_id)
            for round_ in campaign.rounds
            if round_.stage == pb.ROUND_STAGE_COMMITTED
            for name in round_.survivors
        }

    def missing(self, campaign: pb.Campaign) -> set[tuple[str, str]]:
        """Give (device, round) that count and were not told so, though the device knew of it."""
        return self.counted(campaign) - self.lost_memory - self.told()

    def told(self) -> set[tuple[str, str]]:
        """Give (device, round) of all that were told that they count."""
        return {
            (name, round_id)
            for name in WEIGHTS
            for round_id, result in told(self.folder / name / DEVICE_LOG).items()
            if result == "counted"
        }
