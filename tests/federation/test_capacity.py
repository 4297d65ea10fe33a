"""Links whose devices measure what they carry."""

from pathlib import Path

import numpy as np
import pytest

from minga.federation.device.capacity import (
    MEASURED_FROM_BYTES,
    WORTH_PACKING_BELOW,
    Capacity,
    Compress,
)
from minga.federation.device.metrics import Metrics
from minga.federation.limits import MIB
from minga.federation.transfer import Moved
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import Fleet, campaign_plan
from tests.federation.proxy import open_proxy

FAR, NEAR = "far", "near"
SLOW_S = 0.04
"""What 64 KiB take on the slow link: it carries 1.6 MB/s."""

SPARSE = np.random.default_rng(0).normal(size=(500, 400)).astype(np.float32)
SPARSE[np.random.default_rng(1).random(SPARSE.shape) < 0.7] = 0


async def test_a_slow_link_gets_packed_chunks(tmp_path: Path) -> None:
    """From the second round on models are packed for the slow device, and for it alone."""
    async with (
        Fleet(tmp_path) as fleet,
        open_proxy(fleet.ports["port"], latency_s=SLOW_S) as proxy,
    ):
        options = {"step": 0.5, "num_examples": 10}
        await fleet.add(FAR, options, address=proxy.address, allow_plain=True)
        await fleet.add(NEAR, options, allow_plain=True)
        await fleet.until(lambda devices: sum(device.connected for device in devices) == 2)
        plan = campaign_plan(
            cohort=2, min_cohort=2, num_rounds=2, protection=pb.PROTECTION_PLAIN, max_weight=10
        )
        await fleet.finish(await fleet.start_campaign(plan, {"w": SPARSE}))
        wire, content = _moved(fleet, FAR)
        assert content == pytest.approx(2 * SPARSE.nbytes, rel=0.01)  # and headers
        assert wire < 0.8 * content
        near_wire, near_content = _moved(fleet, NEAR)
        assert near_wire == near_content == content
        rate = fleet.metrics[FAR].registry.get_sample_value(
            "minga_device_link_bytes_per_second", {"way": "down"}
        )
        assert rate is not None
        assert rate < 2 * 65536 / SLOW_S < WORTH_PACKING_BELOW
        await fleet.stop_device(FAR)


def _moved(fleet: Fleet, name: str) -> tuple[float, float]:
    """Say what a device's models took on the link, and unpacked."""
    registry = fleet.metrics[name].registry
    wire = registry.get_sample_value("minga_device_blob_wire_bytes_total", {"way": "down"})
    content = registry.get_sample_value("minga_device_blob_content_bytes_total", {"way": "down"})
    assert wire is not None
    assert content is not None
    return wire, content


def test_the_best_of_the_newest_transfers_decides() -> None:
    """One fast transfer shows a fast link; a link that was fast long ago counts as slow."""
    capacity = Capacity("auto", Metrics())
    slow = Moved(content_bytes=MIB, wire_bytes=MIB, seconds=1.0)
    fast = Moved(content_bytes=MIB, wire_bytes=MIB, seconds=0.01)
    assert not capacity.packs("up")
    seen = []
    for moved in (slow, fast, slow, slow, slow, slow):
        capacity.note("up", moved)
        seen.append(capacity.packs("up"))
        assert not capacity.packs("down")
    assert seen == [True, False, False, False, False, True]


def test_small_transfers_say_nothing() -> None:
    """What is mostly waiting does not make a link slow."""
    capacity = Capacity("auto", Metrics())
    size = MEASURED_FROM_BYTES - 1
    capacity.note("up", Moved(content_bytes=size, wire_bytes=size, seconds=60.0))
    assert not capacity.packs("up")


def test_the_owner_may_decide() -> None:
    """Always and never mean that, whatever the link."""
    owners: tuple[Compress, ...] = ("always", "never")
    for compress in owners:
        capacity = Capacity(compress, Metrics())
        for seconds in (10.0, 0.001):
            capacity.note("up", Moved(content_bytes=MIB, wire_bytes=MIB, seconds=seconds))
            assert capacity.packs("up") is (compress == "always")
