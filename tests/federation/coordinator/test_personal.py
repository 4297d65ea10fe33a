"""Tensors that never leave their device."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation import wire
from minga.federation.errors import CampaignError, PeerError
from minga.federation.parameters import Parameters, from_bytes
from minga.federation.parts import is_personal, split_personal
from minga.federation.trainer import TrainingConfig, Update
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Method, new_evaluation
from tests.federation.coordinator.desk import Desk
from tests.federation.fleet import campaign_plan

SHARED = {"body.w": np.zeros(5, np.float32)}
PATTERNS = ("head.*",)
MARKS = (np.float32(1.2345678), np.float32(-7.6543210), np.float32(3.3331111))
"""In each device's own tensors, and nowhere else: no other value has these bytes."""


class HeadTrainer:
    """Moves the body by 1 and its own head by its mark, and says what its head is."""

    def __init__(self, mark: np.float32) -> None:
        self.mark = mark

    async def initial(self, config: TrainingConfig) -> Parameters:
        return {"body.w": np.ones(5, np.float32), "head.w": np.zeros(3, np.float32)}

    async def fit(self, parameters: Parameters, config: TrainingConfig) -> Update:
        assert set(parameters) == {"body.w", "head.w"}
        delta = {"body.w": np.ones(5, np.float32), "head.w": np.full(3, self.mark, np.float32)}
        return Update(delta=delta, num_examples=10)

    async def evaluate(self, parameters: Parameters, config: TrainingConfig) -> dict[str, float]:
        return {"head": float(parameters["head.w"][0]), "num_examples": 1}


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and three devices with heads of their own, connected."""
    desk = Desk(tmp_path)
    for index, mark in enumerate(MARKS):
        desk.hire(f"site-{index}", HeadTrainer(mark))
    desk.start()
    desk.connect()
    yield desk
    await desk.stop()


def plan_of(**changes: object) -> pb.CampaignPlan:
    numbers = {"cohort": 3, "num_rounds": 2, "clip": 16.0, "value_bits": 20, "personal": PATTERNS}
    return campaign_plan(**{**numbers, **changes})


async def heads(desk: Desk, campaign: pb.Campaign) -> list[np.float32]:
    """Give what the devices keep, when all have heard how the last round ended."""
    for device in desk.devices.values():
        await device.end_of(campaign.rounds[-1].round_id)
    return [d.keepsakes.personal("toy")["head.w"][0] for d in desk.devices.values()]


@pytest.mark.parametrize("protection", [pb.PROTECTION_SECURE, pb.PROTECTION_PLAIN])
async def test_heads_stay_at_home(desk: Desk, protection: "pb.Protection") -> None:
    """The body is everybody's, heads differ; no byte of a head is in anything that arrived."""
    seen: list[bytes] = []
    put = desk.put
    desk.put = lambda digest, data, sender: (seen.append(data), put(digest, data, sender))[1]  # type: ignore[method-assign,func-returns-value]
    campaign = await desk.finish(desk.start_campaign(plan_of(protection=protection), SHARED))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    model = from_bytes(desk.blobs.read(campaign.model_digest))
    assert set(model) == {"body.w"}
    np.testing.assert_allclose(model["body.w"], 2.0, atol=1e-3)
    assert await heads(desk, campaign) == [np.float32(0) + mark + mark for mark in MARKS]
    assert len(seen) == 6
    arrived = seen + [
        file.read_bytes()
        for file in desk.folder.rglob("*")
        if file.is_file() and "devices" not in file.parts
    ]
    for mark in MARKS:
        for value in (mark, mark + mark):
            assert not any(value.tobytes() in data for data in arrived)


async def test_device_measures_with_its_own_head(desk: Desk) -> None:
    """Evaluation is of the model as each device has it: the mean over their heads."""
    evaluation = wire.evaluation_to_wire(new_evaluation(("head",), 100.0))
    plan = plan_of(evaluation=evaluation, evaluate_every=1)
    campaign = await desk.finish(desk.start_campaign(plan, SHARED))
    measured = [r.metrics["head"] for r in campaign.rounds if r.work == pb.ROUND_WORK_EVALUATION]
    assert measured == pytest.approx([np.mean(MARKS), 2 * np.mean(MARKS)], abs=1e-3)


async def test_heads_outlive_campaigns(desk: Desk) -> None:
    """The next campaign of a model goes on with the heads; that of another model has others."""
    await desk.finish(desk.start_campaign(plan_of(), SHARED))
    again = await desk.finish(desk.start_campaign(plan_of(num_rounds=1), SHARED))
    assert await heads(desk, again) == pytest.approx([3 * mark for mark in MARKS])
    plan = plan_of(num_rounds=1, model_name="other")
    other = await desk.finish(desk.start_campaign(plan, SHARED))
    assert await heads(desk, other) == pytest.approx([3 * mark for mark in MARKS])
    kept = desk.devices["site-0"].keepsakes.personal("other")["head.w"]
    np.testing.assert_array_equal(kept, MARKS[0])


async def test_head_of_another_shape_is_made_anew(desk: Desk) -> None:
    """What was kept for a network of another shape is of no use, and costs no round."""
    device = desk.devices["site-0"]
    device.keepsakes.stage(
        "ab" * 16,
        model_name="toy",
        personal={"head.w": np.ones(7, np.float32)},
        campaign_id="ab",
        control={},
    )
    device.keepsakes.settle("ab" * 16, counted=True)
    campaign = await desk.finish(desk.start_campaign(plan_of(num_rounds=1), SHARED))
    assert await heads(desk, campaign) == list(MARKS)


@pytest.mark.parametrize(
    ("changes", "model", "message"),
    [
        ({}, {**SHARED, "head.w": np.zeros(3, np.float32)}, "'head.w' is personal"),
        ({"personal": [""]}, SHARED, "patterns of 1 to 200"),
        ({"model_name": "../x"}, SHARED, "under the model's name"),
    ],
)
async def test_campaigns_that_would_send_heads(
    desk: Desk, changes: dict[str, object], model: Parameters, message: str
) -> None:
    """A model with personal tensors starts no campaign, nor do patterns or names that are none."""
    with pytest.raises(CampaignError, match=message):
        desk.start_campaign(plan_of(**changes), model)


def test_pattern_that_takes_long() -> None:
    """A pattern made to be slow is not: a device matches it at once."""
    assert not is_personal("a" * 200, ("*a" * 90 + "b",))
    with pytest.raises(PeerError):
        Method(personal=("x",) * 65)


def test_split() -> None:
    """Every tensor is on one side."""
    model = {name: np.zeros(1, np.float32) for name in ("head.w", "headless", "body.head.w")}
    shared, personal = split_personal(model, PATTERNS)
    assert (set(shared), set(personal)) == ({"headless", "body.head.w"}, {"head.w"})
