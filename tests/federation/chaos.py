"""Points at which a coordinator and its devices are killed, and a fleet that goes through them."""

import asyncio
import logging
import random
import shutil
from collections import Counter
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from minga.federation import audit
from minga.federation.certificates import load_certificate
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.campaign import Campaign
from minga.federation.coordinator.store import DATABASE_FILE, Store
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.exact import WEIGHTS, assert_exact, exact_options, exact_plan
from tests.federation.fleet import PATIENCE_S, toy_model
from tests.federation.process_fleet import ProcessFleet
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

_device: ContextVar[tuple["Ledger", str]] = ContextVar("device")


class Ledger(logging.Handler):
    """Notes how each device of a fleet says that its rounds ended, from the log that it writes."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.told: dict[tuple[str, str], str] = {}
        """(device, round) -> `counted`, `committed` without it, or `aborted`."""

    def emit(self, record: logging.LogRecord) -> None:
        """Take down a line."""
        if record.msg == "round %s: %s %s" and isinstance(record.args, tuple):
            round_id, result, _ = record.args
            ledger, name = _device.get()
            if ledger is not self:
                return
            key = (name, str(round_id))
            assert self.told.setdefault(key, str(result)) == result, f"{key} was told two things"


# --- going through them ---


class ChaosFleet(ProcessFleet):
    """A coordinator process behind a slow link, five devices, and what became of them."""

    def __init__(self, folder: Path, proxy: Proxy) -> None:
        super().__init__(folder)
        self.proxy = proxy
        self.ledger = Ledger()
        self.lost_memory: set[tuple[str, str]] = set()
        """(device, round): the device was killed and may not know how that round ended."""
        self.hits: Counter[str] = Counter()

    async def open(self) -> None:
        """Add the devices."""
        self.proxy.port = self.ports["port"]
        for name in WEIGHTS:
            await self.enrol(name)
            self.run_device(name)

    def run_device(self, name: str) -> None:
        """Run a device behind the proxy; what it logs is noted under its name."""
        token = _device.set((self.ledger, name))
        options = exact_options(name, delay_s=TRAINING_S)
        self.start_device(name, options, address=self.proxy.address)
        _device.reset(token)

    async def strike(self, campaign_id: str, point: Point) -> str:
        """Kill at a point, and start all again; tells where the round was."""
        await self.until_in(campaign_id, point.number, point.stage)
        await asyncio.sleep(point.delay_s)
        await self.stop_coordinator()
        campaign = self.stored(campaign_id)
        if point.victim:
            await self.stop_device(point.victim)
            rounds = [record.round_id for record in campaign.records[-1:]]
            rounds += [campaign.open_round.order.round_id] if campaign.open_round else []
            self.lost_memory |= {(point.victim, round_id) for round_id in rounds}
            self.run_device(point.victim)
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
        told = {key for key, result in self.ledger.told.items() if result == "counted"}
        assert told <= self.counted(campaign), "these devices were told so and do not count"
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
        told = {key for key, result in self.ledger.told.items() if result == "counted"}
        return self.counted(campaign) - self.lost_memory - told
