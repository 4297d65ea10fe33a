"""Flower's apps and strategies over real gRPC with mutual TLS: the outcome is Flower's."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from flwr.common import ndarrays_to_parameters
from flwr.server import strategy as older
from flwr.serverapp import strategy as newer

from minga.federation import wire
from minga.federation.errors import CampaignError
from minga.federation.flower.arrays import (
    FLOWER_ARRAYS,
    names_to_text,
    to_arrays,
    to_parameters,
)
from minga.federation.flower.config import StrategyName
from minga.federation.flower.folder import TRAINER
from minga.federation.parameters import from_bytes
from minga.federation.trainer import Scalar
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import PATIENCE_S, Fleet, campaign_plan
from tests.federation.flower.apps import ridge
from tests.federation.flower.drivers import Arrays, drive_newer, drive_older

APPS = Path(__file__).parent / "flower" / "apps"
NUM_DEVICES = 4
NUM_ROUNDS = 3
RATE = 0.25


@pytest.fixture
async def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    """A coordinator that lets two strategies of the tests in."""
    monkeypatch.syspath_prepend(APPS)
    allowed = ("strategies:Recorder", "strategies:Failing")
    async with Fleet(tmp_path, strategies=allowed) as fleet:
        yield fleet


async def add_devices(fleet: Fleet, app: str) -> None:
    """Run an unmodified Flower app on each device, as `minga device run --project` does."""
    for index in range(NUM_DEVICES):
        options = {"project": str(APPS), "client_app": app, "partition-id": str(index)}
        await fleet.add(f"site-{index}", options, trainer=TRAINER, allow_plain=True)


def flower_plan(reference: str, *, on_sums: bool = False, **changes: object) -> pb.CampaignPlan:
    """Give a plan of plain rounds, unless it is said otherwise, under a Flower strategy."""
    arguments: dict[str, Scalar] = changes.pop("arguments", {})  # type: ignore[assignment]
    name = StrategyName(reference=reference, arguments=arguments, on_sums=on_sums)
    given = {
        "num_rounds": NUM_ROUNDS,
        "min_cohort": NUM_DEVICES,
        "protection": pb.PROTECTION_PLAIN,
        "flower_strategy": wire.strategy_to_wire(name),
        **changes,
    }
    return campaign_plan(**given)


async def run(fleet: Fleet, plan: pb.CampaignPlan) -> pb.Campaign:
    """Run a campaign from the app's first weights."""
    model = to_parameters(ridge.initial_weights())
    return await fleet.finish(await fleet.start_campaign(plan, model))


async def assert_outcome(fleet: Fleet, campaign: pb.Campaign, arrays: Arrays, atol: float) -> None:
    """The campaign came to these weights, with all devices in each round."""
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert [len(round_.survivors) for round_ in campaign.rounds] == [NUM_DEVICES] * NUM_ROUNDS
    result = to_arrays(from_bytes(await fleet.operator.read(campaign.model_digest)))
    for ours, theirs in zip(result, arrays, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol)


def train_all(weights: Arrays, *, epochs: int) -> list[tuple[Arrays, int]]:
    """Train on every site, as the app does."""
    sites = [ridge.load_data(index) for index in range(NUM_DEVICES)]
    return [(ridge.train(weights, *data, epochs=epochs, rate=RATE), len(data[0])) for data in sites]


async def test_classic_app_under_median(fleet: Fleet) -> None:
    """A NumPyClient app on devices, FedMedian in the coordinator: Flower's outcome of the same."""
    await add_devices(fleet, "numpy_app:app")
    plan = flower_plan(
        "flwr.server.strategy:FedMedian", training=wire.config_to_wire({"epochs": 2})
    )
    expected = drive_older(
        older.FedMedian(),
        ridge.initial_weights(),
        lambda _, weights: train_all(weights, epochs=2),
        num_rounds=NUM_ROUNDS,
    )
    await assert_outcome(fleet, await run(fleet, plan), expected, atol=1e-5)


async def test_message_app_under_fedadam_and_secure_aggregation(fleet: Fleet) -> None:
    """Functions of messages on devices, FedAdam in the coordinator, which sees one sum alone."""
    await add_devices(fleet, "")
    arguments: dict[str, Scalar] = {"eta": 0.1, "tau": 0.1}
    few: dict[str, Scalar] = {"min_available_nodes": 3, "min_train_nodes": 3}
    plan = flower_plan(
        "flwr.serverapp.strategy:FedAdam",
        arguments={**arguments, **few},
        protection=pb.PROTECTION_SECURE,
        clip=4.0,
        value_bits=24,
    )
    expected = drive_newer(
        newer.FedAdam(**arguments),
        ridge.initial_weights(),
        lambda _, weights: train_all(weights, epochs=2),
        num_rounds=NUM_ROUNDS,
    )
    campaign = await run(fleet, plan)
    assert campaign.rounds[0].HasField("plan"), "the rounds were masked"
    await assert_outcome(fleet, campaign, expected, atol=1e-4)


async def test_own_strategy_outlives_the_coordinator(fleet: Fleet) -> None:
    """A user's subclass goes on with its momentum after the coordinator was stopped twice."""
    await add_devices(fleet, "numpy_app:client_fn")
    training = wire.config_to_wire({"delay": 0.3})
    momentum: dict[str, Scalar] = {"server_momentum": 0.75}
    plan = flower_plan("strategies:Recorder", arguments=momentum, training=training)
    first = ridge.initial_weights()
    campaign_id = await fleet.start_campaign(plan, to_parameters(first))
    for number in range(2, NUM_ROUNDS + 1):
        await reach_round(fleet, campaign_id, number)
        await fleet.stop_coordinator()
        await fleet.start_coordinator()
    expected = drive_older(
        older.FedAvgM(initial_parameters=ndarrays_to_parameters(first), **momentum),
        first,
        lambda number, weights: train_all(weights, epochs=number),  # as it tells the devices
        num_rounds=NUM_ROUNDS,
    )
    await assert_outcome(fleet, await fleet.finish(campaign_id), expected, atol=1e-5)


async def reach_round(fleet: Fleet, campaign_id: str, number: int) -> None:
    """Wait until a round has begun, and so the one before it is committed."""
    async with asyncio.timeout(PATIENCE_S):
        async for campaign in fleet.operator.watch(campaign_id):
            if len(campaign.rounds) == number:
                return


async def test_median_of_secure_groups(fleet: Fleet) -> None:
    """A strategy that compares gets one sum per group: FedMedian of two lies amid their means."""
    for index, step in enumerate([1.0, 1.0, 1.0, -1.0, 1.0, 1.0]):
        await fleet.add(f"site-{index}", {"step": step, "num_examples": 100 if index else 50})
    plan = flower_plan(
        "flwr.server.strategy:FedMedian",
        protection=pb.PROTECTION_SECURE,
        num_rounds=1,
        num_groups=2,
        cohort=6,
        min_cohort=6,
        expected_dropout=0.0,
        training=wire.config_to_wire({FLOWER_ARRAYS: names_to_text({"w": "w", "b": "b"})}),
    )
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert campaign.rounds[0].total_weight == 550
    weights = from_bytes(await fleet.operator.read(campaign.model_digest))["w"]
    # Site 3 steps back; whether site 0, which has half the examples, is in its group decides.
    means = [(1.0 + 50 / 250) / 2, (1.0 + 100 / 300) / 2]
    assert min(np.abs(weights - mean).max() for mean in means) < 1e-3


async def test_a_device_that_is_not_needed_is_no_failure(fleet: Fleet) -> None:
    """A strategy that accepts no failures takes a round whose slowest device was left behind."""
    for index, delay_s in enumerate([0.0, 0.0, 0.0, 600.0]):
        options = {"step": 1.0, "delay_s": delay_s}
        await fleet.add(f"site-{index}", options, allow_plain=True)
    plan = flower_plan(
        "flwr.server.strategy:FedAvg",
        arguments={"accept_failures": False},
        num_rounds=1,
        cohort=3,
        min_cohort=3,
        over_selection=0.33,
        training=wire.config_to_wire({FLOWER_ARRAYS: names_to_text({"w": "w", "b": "b"})}),
    )
    campaign = await fleet.finish(await fleet.start_campaign(plan))
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    assert "site-3" in campaign.rounds[0].lost


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "os:system"}, "does not run the strategy 'os:system'.*--strategy os:system"),
        ({"protection": pb.PROTECTION_SECURE}, "looks at single updates"),
        ({"arguments": {"betta": 0.2}}, "TypeError.*betta"),
        ({"server_learning_rate": 0.5}, "takes the server optimiser's place"),
    ],
)
async def test_impossible_campaign(fleet: Fleet, changes: dict, message: str) -> None:
    """An operator is told at once why a campaign cannot have the strategy that it names."""
    plan = flower_plan(**{"reference": "flwr.server.strategy:FedMedian", **changes})
    with pytest.raises(CampaignError, match=message):
        await run(fleet, plan)
    assert not (await fleet.operator.status()).campaigns


async def test_failing_strategy_fails_its_campaign(fleet: Fleet) -> None:
    """Rounds whose strategy raises are aborted with its reason; the coordinator lives on."""
    await add_devices(fleet, "numpy_app:RidgeClient")
    campaign = await run(fleet, flower_plan("strategies:Failing", arguments={"fault": "raise"}))
    assert campaign.state == pb.CAMPAIGN_STATE_FAILED
    assert "strategies:Failing failed: KeyError: 'accuracy'" in campaign.reason
    plan = flower_plan("flwr.server.strategy:FedAvg", num_rounds=1)
    assert (await run(fleet, plan)).state == pb.CAMPAIGN_STATE_COMPLETED
