"""What a coordinator process has of a single update, in its memory and on its disk: nothing.

A real process in a real round is stopped in the middle and searched for the updates of its devices,
which the test knows, in every form that the protocol gives them. That the search finds what is
there is shown by things that the coordinator does hold, and by a device that forgets its masks.
"""

import os
import re
import secrets
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from minga.federation import wire
from minga.federation.parameters import Layout
from minga.federation.secagg.fixedpoint import encode_update
from minga.federation.secagg.packing import pack
from minga.federation.transfer import digest_of
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.audit.test_misbehaviour import Mallory
from tests.federation.device.drawn_trainer import drawn_levels
from tests.federation.fleet import campaign_plan, toy_model
from tests.federation.process_fleet import ProcessFleet

pytestmark = pytest.mark.slow

MODEL = toy_model(50_000)
NUM_VALUES = Layout.of(MODEL).num_values
WEIGHT = 100
RING_BITS = 16 + 2
SEEDS = {f"site-{number}": 100 + number for number in range(4)}
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
PLANTED = secrets.token_hex(16)
EXACT = {
    "clip": 2.0**15 - 1,  # a level is exactly 1
    "value_bits": 16,
    "max_weight": WEIGHT,
    "stage_timeout_s": 5.0,
    "invite_timeout_s": 5.0,
}


class DrawnFleet(ProcessFleet):
    """A coordinator process, and devices whose updates are drawn from their seeds."""

    async def add_sites(self, *names: str, last_delay_s: float = 0.0) -> None:
        """Add devices; the last one takes its time."""
        for name in names:
            delay_s = last_delay_s if name == names[-1] else 0.0
            options = {"seed": SEEDS[name], "num_examples": WEIGHT, "delay_s": delay_s}
            await self.enrol(name)
            self.start_device(name, options, trainer="drawn_trainer:make")

    async def until_uploaded(self, campaign_id: str, count: int) -> None:
        """Wait until some updates are in."""
        async for campaign in self.operator.watch(campaign_id):
            if campaign.rounds and len(campaign.rounds[-1].survivors) >= count:
                return

    def found(self, patterns: Mapping[str, bytes]) -> dict[str, set[str]]:
        """Stop the coordinator and search its memory and its files; gives pattern -> places."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            places: dict[str, set[str]] = {}
            for place, data in [*memory(self.process.pid), *files(self.folder / "coordinator")]:
                for name, pattern in patterns.items():
                    if pattern in data:
                        places.setdefault(name, set()).add(place)
            return places
        finally:
            self.process.send_signal(signal.SIGCONT)


def memory(pid: int) -> Iterator[tuple[str, bytes]]:
    """Read everything that a process can write to, but for pages of zeros."""
    proc = Path(f"/proc/{pid}")
    with (proc / "maps").open() as maps, (proc / "mem").open("rb", 0) as mem:
        for line in maps:
            low, high, access = re.match(r"(\w+)-(\w+) (\S+)", line).groups()
            if access.startswith("rw"):
                mem.seek(int(low, 16))
                pages = np.frombuffer(mem.read(int(high, 16) - int(low, 16)), np.uint8)
                pages = pages.reshape(-1, PAGE_BYTES)
                yield "memory", pages[pages.any(axis=1)].tobytes()


def files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Read all files below a folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


def forms_of(name: str, seed: int) -> dict[str, bytes]:
    """Give a piece of an update, in all the forms that it has before masks come on."""
    levels, start = drawn_levels(seed, NUM_VALUES), 8 * 2_000
    packed = pack(np.append(levels, WEIGHT).astype(np.int32).view(np.uint32), RING_BITS)
    part = levels[start : start + 16]
    return {
        f"{name} float32": part.astype("<f4").tobytes(),
        f"{name} float64": part.astype("<f8").tobytes(),
        f"{name} levels": part.astype("<i4").tobytes(),
        f"{name} packed": packed[start // 8 * RING_BITS :][: 2 * RING_BITS],
    }


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[DrawnFleet]:
    """A coordinator process without devices."""
    async with DrawnFleet(tmp_path) as fleet:
        yield fleet


async def test_the_coordinator_holds_no_single_update(fleet: DrawnFleet) -> None:
    """While updates come in, while they are unmasked, and after the round: no trace of one."""
    await fleet.add_sites(*SEEDS, last_delay_s=2.0)
    patterns = {k: v for name, seed in SEEDS.items() for k, v in forms_of(name, seed).items()}
    planted = {"text": PLANTED.encode()}
    training = wire.config_to_wire({"planted": PLANTED})
    campaign_id = await fleet.start_campaign(campaign_plan(**EXACT, training=training), MODEL)

    await fleet.until_uploaded(campaign_id, 3)
    campaign = await fleet.reach(campaign_id, pb.ROUND_STAGE_UPDATES)
    planted["bytes"] = campaign.model_digest
    found = fleet.found(patterns | planted)
    assert found.keys() == planted.keys()
    assert all("memory" in places for places in found.values())
    assert any(place.startswith("coordinator.db") for place in found["text"])

    stages = (pb.ROUND_STAGE_CONFIRM, pb.ROUND_STAGE_UNMASK, pb.ROUND_STAGE_AGGREGATE)
    await fleet.reach(campaign_id, *stages, pb.ROUND_STAGE_COMMITTED)
    assert not fleet.found(patterns)

    campaign = await fleet.finish(campaign_id)
    assert list(campaign.rounds[0].survivors) == list(SEEDS)
    assert not fleet.found(patterns)
    # The sum is no secret, and the search finds it: the global model was zero at the start.
    levels = sum(drawn_levels(seed, NUM_VALUES) for seed in SEEDS.values())
    part = slice(8 * 2_000, 8 * 2_000 + 16)
    mean = Layout.of(MODEL).flatten(MODEL)[part] + (levels[part] / 4).astype(np.float32)
    assert fleet.found({"mean": mean.astype("<f4").tobytes()})


async def test_an_update_without_masks_would_be_found(fleet: DrawnFleet) -> None:
    """A device that forgets its masks leaves its update where the search looks."""
    await fleet.enrol("mallory")
    await fleet.add_sites(*list(SEEDS)[:3])
    async with fleet.stream("mallory", pb.Hello(trains=True)) as stream:
        campaign_id = await fleet.start_campaign(campaign_plan(**EXACT), MODEL)
        mallory = Mallory(fleet, stream, (await stream.read()).invite)
        advert = wire.advert_to_wire(mallory.round_id, mallory.session.advertise())
        keys = await mallory.say(key_advert=advert)
        adverts = [wire.advert_from_wire(one) for one in keys.neighbour_keys.adverts]
        shares = mallory.session.share(adverts)
        await mallory.say(shares=wire.shares_to_wire(mallory.round_id, shares))
        delta = drawn_levels(7, NUM_VALUES).astype(np.float32)
        bare = pack(encode_update(mallory.plan, delta, WEIGHT, os.urandom), RING_BITS)
        await mallory.upload(bare, bare)
        update = pb.MaskedUpdate(round_id=mallory.round_id, digest=digest_of(bare), size=len(bare))
        await mallory.say(masked_update=update)
        found = fleet.found(forms_of("mallory", 7))
        await fleet.operator.cancel(campaign_id)
    assert found.keys() == {"mallory packed"}
    (places,) = found.values()
    assert any(place.startswith("blobs") for place in places)
