"""Campaigns on virtual devices."""

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from minga.federation.errors import BudgetError, CampaignError
from minga.federation.parameters import Layout, to_bytes
from minga.federation.planning import campaign_plan
from minga.federation.v1 import federation_pb2 as pb
from minga.training.network import build_network, parameters_of
from minga.training.simulation.config import ColumnTable, EqualTable, SourcesTable
from minga.training.simulation.effort import is_worth_dividing, operations_of_round
from minga.training.simulation.lesson import Way
from minga.training.simulation.partition import populate
from minga.training.simulation.simulate import simulate
from tests.federation.fleet import Fleet
from tests.training.simulation.conftest import TASKS, reference_to


def values_of(simulated):
    """Give the last model as one vector."""
    return Layout.of(simulated.parameters).flatten(simulated.parameters)


def test_rounds_learn(simulation):
    """Over some rounds the model gets better, and each round's record says how good it is."""
    done = simulate(simulation(num_rounds=12))
    accuracies = [record["accuracy"] for record in done.history]
    assert len(accuracies) == done.num_rounds == 12
    assert accuracies[-1] > accuracies[0] + 0.2
    assert {record["devices"] for record in done.history} == {6}
    assert all(record["examples"] > 0 for record in done.history)
    assert done.finished
    assert done.one_by_one == ""


CAMPAIGNS = {
    "plain": {},
    "secure": {"protection": "secure"},
    "secure groups": {"protection": "secure", "groups": 2, "min_cohort": 6, "expected_dropout": 0},
    "fedprox": {"training": {"epochs": 2, "proximal_mu": 0.1}},
    "scaffold": {"scaffold": True, "training": {"epochs": 2}},
    "secure scaffold": {"scaffold": True, "protection": "secure"},
    "fedadam": {"server_optimizer": {"name": "fedadam", "learning_rate": 0.05}},
    "median": {"rule": {"name": "median"}},
    "personal": {"personal": ["model.head.*"], "training": {"epochs": 2}},
    "evaluation": {"evaluation": {"enabled": True, "every": 1}},
    "buffer": {"buffer": {"size": 3, "max_staleness": 2}},
    "noise of devices": {
        "protection": "secure",
        "privacy": {
            "name": "distributed",
            "epsilon": 1e4,
            "delta": 1e-3,
            "noise_multiplier": 0.15,
            "max_norm": 1.0,
            "quantile": 0.5,
        },
    },
    "private": {
        "privacy": {
            "name": "central",
            "epsilon": 1e4,
            "delta": 1e-3,
            "noise_multiplier": 0.5,
            "max_norm": 1.0,
        }
    },
}


@pytest.mark.parametrize("changes", CAMPAIGNS.values(), ids=CAMPAIGNS.keys())
def test_every_kind_of_campaign_repeats_and_resumes(simulation, tmp_path, changes):
    """Played twice it gives the same bits; interrupted after any round and taken up, too."""
    devices = {"dropout": 0.1, "seconds_per_example": 0.1, "speed_spread": 1.0}
    played = simulation("Headed", num_rounds=4, devices=devices, **changes)
    whole = simulate(played)
    state = tmp_path / "state"
    calls: list[int] = []

    def stop(record):
        calls.append(record["epoch"])
        if len(calls) % 2 == 0:
            raise KeyboardInterrupt
        return False

    again = None
    while again is None:
        try:
            again = simulate(played, on_round=stop, state=state)
        except KeyboardInterrupt:
            assert state.exists()
    assert len(calls) >= 4
    history = again.history
    assert history == whole.history
    assert np.array_equal(values_of(again), values_of(whole))
    assert not state.exists()
    assert [r.model_digest for r in again.campaign.rounds] == [
        r.model_digest for r in whole.campaign.rounds
    ]


def test_one_by_one_gives_the_same_campaign(simulation):
    """A whole campaign differs by rounding alone, whether devices train together or not."""
    together = simulation(num_rounds=4, scaffold=True, training={"epochs": 2, "proximal_mu": 0.1})
    alone = replace(together, config=together.config.model_copy(update={"vectorise": False}))
    one, other = simulate(together), simulate(alone)
    assert other.one_by_one == "vectorise is off in [simulation]"
    np.testing.assert_allclose(values_of(one), values_of(other), rtol=1e-3, atol=1e-5)


def test_secure_rounds_differ_by_rounding_alone(simulation):
    """The secure sum is the plain one but for its fixed point."""
    plain = simulate(simulation(num_rounds=2))
    secure = simulate(simulation(num_rounds=2, protection="secure", max_weight=128))
    difference = np.abs(values_of(plain) - values_of(secure)).max()
    assert 0 < difference < 1e-3


def test_lost_devices_end_rounds_as_in_earnest(simulation):
    """Devices that vanish are lost by name; too many of them abort rounds, then the campaign."""
    some = simulate(simulation(num_rounds=6, devices={"dropout": 0.3}))
    lost = [dict(record.lost) for record in some.campaign.rounds]
    assert {reason for one in lost for reason in one.values()} == {"vanished while it trained"}
    with pytest.raises(CampaignError, match="3 rounds in a row failed"):
        simulate(simulation(devices={"dropout": 1.0}))


def test_slow_devices_are_not_needed_or_too_late(simulation):
    """Over-selection counts the fastest; a deadline leaves the slowest out."""
    slow = {"seconds_per_example": 1.0, "speed_spread": 1.5}
    fastest = simulate(simulation(cohort=4, over_selection=0.5, devices=slow))
    for record in fastest.campaign.rounds:
        assert len(record.survivors) == 4
        assert set(record.lost.values()) == {"not needed: enough others were faster"}
    timed = simulate(simulation(training_timeout_s=40.0, devices=slow))
    reasons = {reason for record in timed.campaign.rounds for reason in record.lost.values()}
    assert reasons == {"too late for stage UPDATES"}
    assert timed.history[-1]["simulated_s"] == pytest.approx(40.0 * len(timed.campaign.rounds))


def test_buffered_rounds_do_not_wait(simulation):
    """With a buffer the same number of rounds takes less simulated time, and devices carry over."""
    slow = {"seconds_per_example": 1.0, "speed_spread": 1.5}
    waits = simulate(simulation(num_rounds=6, devices=slow))
    buffered = simulate(simulation(num_rounds=6, buffer={"size": 3}, devices=slow))
    assert buffered.history[-1]["simulated_s"] < 0.7 * waits.history[-1]["simulated_s"]
    assert any(record.bases for record in buffered.campaign.rounds)


def test_privacy_budget_ends_a_campaign(simulation):
    """The ledger is the coordinator's: what would overspend is refused, and rounds tell epsilon."""
    privacy = {"name": "central", "epsilon": 50.0, "delta": 1e-3}
    privacy |= {"noise_multiplier": 1.0, "max_norm": 1.0}
    done = simulate(simulation(num_rounds=2, privacy=privacy))
    spent = [record["epsilon"] for record in done.history]
    assert 0 < spent[0] < spent[1] <= 50.0
    with pytest.raises(BudgetError):
        simulate(simulation(num_rounds=2, privacy=privacy | {"epsilon": spent[0] * 1.01}))


def test_devices_measure_on_their_own_data(simulation):
    """Federated evaluation is in the history beside what the centre measured."""
    done = simulate(
        simulation(partition=ColumnTable(), cohort=5, evaluation={"enabled": True, "every": 1})
    )
    for record in done.history:
        assert record["devices_accuracy"] == pytest.approx(record["accuracy"], abs=0.02)


def test_small_rounds_are_not_divided(simulation):
    """Left to itself a simulation of small networks starts no Ray, and says how it trained."""
    entered: list[bool] = []

    @contextmanager
    def ray():
        entered.append(True)
        yield

    played = simulation()
    config = played.config.model_copy(update={"workers": 0})
    done = simulate(replace(played, config=config), reference=reference_to("Dense"), ray=ray)
    assert (done.num_workers, done.way, entered) == (1, Way.DESCENT, [])


def test_work_of_a_round_is_counted(simulation):
    """A forward pass takes two operations for each weight, and a step three times as many."""
    played = simulation(partition=EqualTable(devices=12))
    population = populate(played.task, played.splits, played.config.partition, seed=0)
    network = build_network(played.task, played.task.defaults, played.splits.train, seed=0)
    forward, examples = 2 * (6 * 12 + 12 * 3), 240 / 12
    found = operations_of_round(network, population, cohort=6, epochs=2)
    assert found == 3 * forward * examples * 6 * 2
    assert not is_worth_dividing(found, update_bytes=4 * 6 * 123)
    assert is_worth_dividing(10_000 * found, update_bytes=4 * 6 * 123)
    assert not is_worth_dividing(10_000 * found, update_bytes=1e9)


def test_caller_may_end_it(simulation):
    """A search prunes a simulation by its answer to a round."""
    done = simulate(simulation(num_rounds=9), on_round=lambda record: record["epoch"] == 2)
    assert len(done.history) == 2
    assert not done.finished


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": EqualTable(devices=3), "min_cohort": 4}, "3 virtual devices are fewer"),
        ({"flower": {"client_app": "app.py:app"}}, "Flower are not simulated"),
        ({"protection": "secure", "expected_dropout": 0.49, "colluder_share": 0.4}, "no round"),
    ],
    ids=str,
)
def test_impossible_campaigns_are_refused(simulation, changes, message):
    """What the coordinator would refuse, or what is not simulated, is said before any round."""
    with pytest.raises(CampaignError, match=message):
        simulate(simulation(**changes))


@pytest.mark.slow
async def test_simulated_as_run_for_real(simulation, tmp_path):
    """A real coordinator with real device processes comes to the simulated model, bit by bit."""
    sites = tmp_path / "sites"
    sites.mkdir()
    for name in ("site-1", "site-2", "site-3"):
        (sites / name).touch()
    project = tmp_path / "project"
    project.mkdir()
    (project / "minga.toml").write_text('task = "virtual.py:Sites"\n')
    (project / "virtual.py").write_text((TASKS / "virtual.py").read_text())
    played = simulation(
        "Sites",
        partition=SourcesTable(pattern="sites/site-*"),
        num_rounds=2,
        cohort=3,
        training={"epochs": 2},
        server_optimizer={"name": "fedavgm", "learning_rate": 0.9},
    )
    played = replace(
        played,
        root=tmp_path,
        config=played.config.model_copy(update={"vectorise": False}),
    )
    simulated = simulate(played)
    async with Fleet(tmp_path / "fleet") as fleet:
        for path in sorted(sites.iterdir()):
            await fleet.add(
                path.name,
                {"project": str(project), "source": str(path)},
                trainer="minga.training.federated:trainer_from_options",
                allow_plain=True,
            )
        campaign_id = await fleet.start_campaign(
            campaign_plan(
                played.federation,
                model_name="dense",
                parent_version="1",
                training={**played.task.defaults, "seed": played.seed},
            ),
            parameters_of(
                build_network(
                    played.task, played.task.defaults, played.splits.train, seed=played.seed
                )
            ),
        )
        campaign = await fleet.finish(campaign_id)
        data = await fleet.operator.read(campaign.model_digest)
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED
    assert data == to_bytes(simulated.parameters)
