"""Campaigns that ask about data."""

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation import wire
from minga.federation.analytics import ColumnQuery, Query, Question
from minga.federation.audit import Entry
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.device.queries import Queries
from minga.federation.errors import CampaignError, QueryRefusedError
from minga.federation.plain import PlainPlan
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.coordinator.desk import Desk
from tests.federation.fleet import campaign_plan, toy_model

NUM_SITES = 6
QUERY = Query(
    columns=(
        ColumnQuery(column="load", low=0.0, high=1.0, edges=(0.0, 0.5, 1.0)),
        ColumnQuery(column="heat", low=-50.0, high=150.0, quantiles=(0.5, 0.95)),
    )
)
ALLOWED = Queries(columns=frozenset({"load", "heat"}), min_cohort=5)


class ColumnsTrainer:
    """Answers from a site's own rows; sites have unlike many."""

    def __init__(self, index: int) -> None:
        generator = np.random.default_rng(index)
        num_rows = 20 + 13 * index
        self.rows = {
            "load": generator.random(num_rows),
            "heat": generator.normal(20 + 5 * index, 10, num_rows),
        }

    async def answer(self, question: Question) -> tuple[np.ndarray, int]:
        return question.answer(self.rows)


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    """A running coordinator and six sites whose owners let two columns be asked about."""
    desk = Desk(tmp_path)
    hire(desk)
    desk.start()
    desk.connect()
    yield desk
    await desk.stop()


def hire(desk: Desk) -> None:
    desk.grace_s = 0.5
    for index in range(NUM_SITES):
        desk.hire(f"site-{index}", ColumnsTrainer(index))
        desk.devices[f"site-{index}"].queries = ALLOWED


def plan_of(query: Query = QUERY, /, **changes: object) -> pb.CampaignPlan:
    numbers = {
        "num_rounds": query.num_rounds,
        "cohort": NUM_SITES,
        "max_weight": 1000,
        "expected_dropout": 0.2,
    }
    plan = campaign_plan(**numbers)
    plan.query.CopyFrom(wire.query_to_wire(query))
    for name, value in changes.items():
        plan.ClearField(name)  # type: ignore[arg-type]
        plan.MergeFrom(pb.CampaignPlan(**{name: value}))  # type: ignore[arg-type]
    return plan


def answers_of(campaign: pb.Campaign) -> list[list[float]]:
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert {round_.work for round_ in campaign.rounds} == {pb.ROUND_WORK_QUERY}
    done = [r for r in campaign.rounds if r.stage == pb.ROUND_STAGE_COMMITTED]
    return [list(round_.answer) for round_ in done]


def assert_right(desk: Desk, campaign: pb.Campaign) -> None:
    """The statistics are those of all rows in one place."""
    trainers = [device.trainer for device in desk.devices.values()]
    load, heat = (
        np.concatenate([trainer.rows[name] for trainer in trainers]) for name in ("load", "heat")
    )
    first, second = QUERY.statistics(answers_of(campaign))
    assert campaign.rounds[0].total_weight == len(load)
    assert first.mean == pytest.approx(load.mean(), abs=1e-3)
    assert first.variance == pytest.approx(load.var(), abs=1e-3)
    assert first.histogram[1] == pytest.approx(np.mean(load < 0.5), abs=1e-3)
    assert second.mean == pytest.approx(heat.mean(), abs=0.05)
    ordered = np.sort(heat)
    for quantile, value in second.quantiles.items():
        index = int(np.ceil(quantile * len(heat))) - 1
        assert ordered[index - 1] - 0.01 <= value <= ordered[index + 1] + 0.01


async def test_statistics_by_sums(desk: Desk) -> None:
    """Means, a histogram and quantiles come out of four secure rounds; nothing is trained."""
    campaign = await desk.finish(desk.start_campaign(plan_of(), toy_model()))
    assert_right(desk, campaign)
    assert len(campaign.rounds) == QUERY.num_rounds == 4
    assert not campaign.model_digest
    assert {d.rounds_counted for d in desk.store.devices()} == {0}
    entries = [e for e in read_log(desk.folder / "coordinator.db") if isinstance(e, Entry)]
    assert entries[0].kind == Kind.CAMPAIGN_STARTED
    assert entries[0].details["query"] == "load,heat"


async def test_killed_between_rounds_and_within(tmp_path: Path) -> None:
    """A coordinator that is killed asks on where it was, and comes to the same statistics."""
    for lives in (3, 17, 31, 50):
        desk = Desk(tmp_path / str(lives))
        hire(desk)
        desk.start()
        campaign, _ = await desk.finish_over_a_kill(plan_of(), toy_model(), lives)
        assert_right(desk, campaign)
        await desk.stop()


async def test_owners_who_do_not_allow_it(desk: Desk) -> None:
    """A device whose owner allows no query, or another column, leaves; the others answer."""
    desk.devices["site-0"].queries = Queries(columns=frozenset({"load"}), min_cohort=5)
    plan = plan_of(min_cohort=5)
    campaign = await desk.finish(desk.start_campaign(plan, toy_model()))
    for round_ in campaign.rounds:
        assert list(round_.lost) == ["site-0"]
        assert "does not let column 'heat' be asked about" in round_.lost["site-0"]
        assert len(round_.survivors) == 5


async def test_too_few_devices_to_hide_among(desk: Desk) -> None:
    """Devices that would be summed with too few others reveal nothing."""
    for name in ("site-4", "site-5"):
        desk.hub.drop(name)
    plan = plan_of(cohort=4, invite_timeout_s=0.2)
    campaign = await desk.finish(desk.start_campaign(plan, toy_model()))
    assert campaign.state == pb.CAMPAIGN_STATE_FAILED
    assert not any(round_.answer for round_ in campaign.rounds)
    assert all("sum over 4 devices" in reason for reason in campaign.rounds[0].lost.values())


async def test_devices_lost_on_the_way(desk: Desk) -> None:
    """Two devices that vanish before they sent leave four survivors: nobody confirms those."""
    for name in ("site-4", "site-5"):
        desk.devices[name].dies_at = "neighbour_shares"
    plan = plan_of(min_cohort=4, expected_dropout=0.34, invite_timeout_s=0.2)
    campaign_id = desk.start_campaign(plan, toy_model())
    campaign = await desk.finish(campaign_id)
    first = campaign.rounds[0]
    assert first.stage == pb.ROUND_STAGE_ABORTED
    assert len(first.survivors) == 4
    assert not any(round_.answer for round_ in campaign.rounds)


def test_the_owners_word() -> None:
    """Nothing is told unless it is named, in no plain round, and not among few."""
    question = QUERY.next_question([])
    assert question is not None
    plan, _ = wire.round_plan(
        plan_of(),
        round_id="00" * 16,
        model_digest=b"",
        training={},
        num_values=0,
        num_invited=NUM_SITES,
        work=question,
    )
    ALLOWED.require_allowed(question, plan)
    with pytest.raises(QueryRefusedError, match="'heat'"):
        Queries().require_allowed(question, plan)
    with pytest.raises(QueryRefusedError, match="own answer"):
        ALLOWED.require_allowed(question, PlainPlan(num_values=10, max_weight=10))
    strict = Queries(columns=ALLOWED.columns, min_cohort=7)
    with pytest.raises(QueryRefusedError, match="7 or more"):
        strict.require_allowed(question, plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protection": pb.PROTECTION_PLAIN}, "sums alone"),
        ({"scaffold": True}, "one of both"),
        ({"model_digest": bytes(32)}, "one of both"),
        ({"query": pb.Query()}, "1 to 256 parts"),
        ({"query": pb.Query(columns=[pb.ColumnQuery(column="a")])}, "bounds"),
    ],
)
async def test_impossible_query_campaigns(
    desk: Desk, changes: dict[str, object], message: str
) -> None:
    """A query that is none, or would not be by sums, starts no campaign."""
    with pytest.raises(CampaignError, match=message):
        desk.start_campaign(plan_of(**changes), toy_model())
