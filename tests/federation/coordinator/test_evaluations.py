"""Rounds in which devices measure the model."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minga.federation import wire
from minga.federation.errors import CampaignError, PeerError, TrainerError
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import TRAINING, Evaluation, new_evaluation
from tests.federation.coordinator.desk import Desk
from tests.federation.fleet import campaign_plan, toy_model

ASKED = new_evaluation(("step", "mean", "unknown"), 10.0)
TRAINED, MEASURED = pb.ROUND_WORK_TRAINING, pb.ROUND_WORK_EVALUATION
SITES = ((1.0, 100), (0.5, 50), (-1.0, 25))
MEAN_STEP = (100 * 1.0 + 50 * 0.5 - 25 * 1.0) / 175
"""Of the updates, and of what the devices say of themselves."""


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and three devices of unlike weight, connected."""
    desk = Desk(tmp_path)
    enrol(desk)
    desk.start()
    desk.connect()
    yield desk
    await desk.stop()


def enrol(desk: Desk) -> None:
    for index, (step, num_examples) in enumerate(SITES):
        desk.enrol(f"site-{index}", step, num_examples)


def plan_of(**changes: object) -> pb.CampaignPlan:
    asked = {"evaluation": wire.evaluation_to_wire(ASKED), "evaluate_every": 1}
    return campaign_plan(**{"cohort": 3, "num_rounds": 2, **asked, **changes})


def kinds(campaign: pb.Campaign) -> list[tuple[int, int]]:
    return [(round_.work, round_.number) for round_ in campaign.rounds]


def assert_measured(campaign: pb.Campaign) -> None:
    """Each evaluation gave the weighted means of the model that its number names."""
    start = float(np.mean([value.mean() for value in toy_model().values()]))
    for round_ in campaign.rounds:
        if round_.work == MEASURED and round_.stage == pb.ROUND_STAGE_COMMITTED:
            assert set(round_.metrics) == {"mean", "step"}
            assert round_.metrics["step"] == pytest.approx(MEAN_STEP, abs=1e-4)
            moved = round_.number * MEAN_STEP
            assert round_.metrics["mean"] == pytest.approx(start + moved, abs=1e-3)
            assert round_.total_weight == 175


async def test_model_is_measured_as_it_grows(desk: Desk) -> None:
    """After each round the means are weighted by examples; a missing metric is left out."""
    campaign = await desk.finish(desk.start_campaign(plan_of(), toy_model()))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert kinds(campaign) == [(TRAINED, 1), (MEASURED, 1), (TRAINED, 2), (MEASURED, 2)]
    assert_measured(campaign)
    assert {d.rounds_counted for d in desk.store.devices()} == {2}


async def test_only_after_the_last_round(desk: Desk) -> None:
    """Unless it is asked for more often, only what the campaign comes to is measured."""
    plan = plan_of(evaluate_every=0, rotate=True, clip=8.0)  # rotation is for updates alone
    campaign = await desk.finish(desk.start_campaign(plan, toy_model()))
    assert kinds(campaign) == [(TRAINED, 1), (TRAINED, 2), (MEASURED, 2)]
    assert_measured(campaign)


@pytest.mark.slow
async def test_killed_before_any_write_of_an_evaluation(tmp_path: Path) -> None:
    """Killed between any two writes, the coordinator trains and measures the same once more."""
    for lives in range(0, 60, 5):
        desk = Desk(tmp_path / str(lives))
        enrol(desk)
        desk.start()
        campaign, was_killed = await desk.finish_over_a_kill(
            plan_of(num_rounds=1), toy_model(), lives
        )
        assert kinds(campaign) == [(TRAINED, 1), (MEASURED, 1)], lives
        assert_measured(campaign)
        await desk.stop()
        if not was_killed:
            return
    raise AssertionError("no life was long enough")


async def test_evaluation_that_fails_costs_no_campaign(desk: Desk) -> None:
    """Devices that cannot measure abort three rounds; the trained model is the campaign's."""

    async def fail(*_: object) -> dict[str, float]:
        raise TrainerError("no validation data")

    for device in desk.devices.values():
        device.trainer.evaluate = fail  # type: ignore[method-assign]
    campaign = await desk.finish(desk.start_campaign(plan_of(num_rounds=1), toy_model()))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    assert kinds(campaign) == [(TRAINED, 1)] + [(MEASURED, 1)] * 3
    assert {r.stage for r in campaign.rounds[1:]} == {pb.ROUND_STAGE_ABORTED}
    moved = desk.moved(campaign, toy_model())
    np.testing.assert_allclose(moved["w"], MEAN_STEP, atol=1e-3)


@pytest.mark.parametrize(
    ("metrics", "clip", "message"),
    [
        ((), 1.0, "1 to 256 metrics"),
        (("b", "a"), 1.0, "sorted"),
        (("a", "a"), 1.0, "each once"),
        (("a\n",), 1.0, "printable"),
        (("a",), 0.0, "positive"),
        (("a",), float("nan"), "positive"),
    ],
)
async def test_impossible_evaluations(
    desk: Desk, metrics: tuple[str, ...], clip: float, message: str
) -> None:
    """What cannot be measured is refused on the device, and when the campaign is started."""
    with pytest.raises(PeerError, match=message):
        Evaluation(metrics=metrics, clip=clip)
    plan = plan_of(evaluation=pb.Evaluation(metrics=metrics, clip=clip))
    with pytest.raises(CampaignError, match=message):
        desk.start_campaign(plan, toy_model())


def test_all_are_asked_the_same() -> None:
    """A device that is asked something else than the others derives other masks."""
    model = bytes(32)
    others = [TRAINING, ASKED, new_evaluation(("step",), 10.0), new_evaluation(("step",), 9.0)]
    assert len({work.subject(model) for work in others}) == len(others)
    assert ASKED.subject(model) != ASKED.subject(bytes([1] * 32))


measured = st.dictionaries(
    st.sampled_from(ASKED.metrics), st.floats(-10, 10, width=32) | st.just(float("nan"))
)


@given(st.lists(st.tuples(measured, st.integers(1, 1000)), min_size=1, max_size=8))
def test_means_are_over_those_that_have_a_metric(sites: list[tuple[dict[str, float], int]]) -> None:
    """The mean of the vectors gives each metric's weighted mean over the devices that have it."""
    vectors = np.array([ASKED.vector_of(metrics) for metrics, _ in sites], np.float64)
    weights = np.array([weight for _, weight in sites])
    result = ASKED.metrics_of(np.average(vectors, axis=0, weights=weights).astype(np.float32))
    for name in ASKED.metrics:
        has = [(m[name], w) for m, w in sites if np.isfinite(m.get(name, np.nan))]
        if not has:
            assert name not in result
            continue
        values, counts = zip(*has, strict=True)
        assert result[name] == pytest.approx(np.average(values, weights=counts), abs=1e-3)
