"""Unmasking on Ray's actors gives what threads give, to the bit."""

from pathlib import Path

import numpy as np
import pytest

from minga.cluster.unmasking import RayMasks, ray_unmasking
from minga.federation.memory import BLOCK_VALUES
from minga.federation.secagg.masking import Mask, apply_masks
from tests.federation.exact import WEIGHTS, assert_exact, exact_options, exact_plan
from tests.federation.fleet import toy_model
from tests.federation.process_fleet import ProcessFleet
from tests.federation.secagg.simulator import seeded_bytes

pytestmark = pytest.mark.slow


def drawn_masks(count: int) -> list[Mask]:
    draw = seeded_bytes("masks")
    return [Mask(key=draw(16), sign=1 if number % 3 else -1) for number in range(count)]


@pytest.mark.usefixtures("ray_cluster")
def test_actors_and_one_thread_agree() -> None:
    """Whatever the length, in fewer or more blocks than actors, every bit is the same."""
    masks = drawn_masks(7)
    with ray_unmasking(2) as unmask_on_ray:
        for num_values in (1, 1000, 3 * BLOCK_VALUES + 17):
            expected = np.arange(num_values, dtype=np.uint32)
            values = expected.copy()
            apply_masks(expected, masks)
            unmask_on_ray(values, masks)
            np.testing.assert_array_equal(values, expected)


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_that_dies_costs_nothing() -> None:
    """A killed actor comes back; without any, threads finish the work."""
    import ray

    masks, expected = drawn_masks(4), np.zeros(2 * BLOCK_VALUES, np.uint32)
    apply_masks(expected, masks)
    on_ray = RayMasks(2)
    ray.kill(on_ray._actors[0], no_restart=False)
    values = np.zeros_like(expected)
    on_ray(values, masks)
    np.testing.assert_array_equal(values, expected)
    on_ray.close()
    values = np.zeros_like(expected)
    on_ray(values, masks)
    np.testing.assert_array_equal(values, expected)


@pytest.mark.usefixtures("ray_cluster")
async def test_a_coordinator_that_unmasks_on_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`minga coordinator run --unmasking ray` in a process of its own comes to the exact mean."""
    import ray

    monkeypatch.setenv("MINGA_COORDINATOR_UNMASKING", "ray")
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    async with ProcessFleet(tmp_path) as fleet:
        for name in WEIGHTS:
            await fleet.add(name, exact_options(name))
        model = toy_model(100_000)
        campaign_id = await fleet.start_campaign(exact_plan(), model)
        await assert_exact(fleet, await fleet.finish(campaign_id), model)
    log = (tmp_path / "coordinator.log").read_text()
    assert "5 masks were taken off by 2 actors on Ray" in log
