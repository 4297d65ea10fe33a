"""Flower's strategies as steps of rounds: what they make is what Flower makes of the same."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.common import ndarrays_to_parameters
from flwr.server import strategy as older
from flwr.serverapp import strategy as newer

from minga.federation.errors import StrategyError
from minga.federation.flower.arrays import FLOWER_ARRAYS, names_to_text
from minga.federation.flower.config import StrategyName
from minga.federation.flower.strategy import (
    BUILT_IN,
    FlowerStrategy,
    Result,
    Step,
)
from minga.federation.parameters import Layout, Parameters
from minga.federation.trainer import Scalar
from tests.federation.flower.drivers import Arrays, drive_newer, drive_older

OLDER, NEWER = "flwr.server.strategy", "flwr.serverapp.strategy"
MINE = "strategies"
DEVICES = tuple(f"site-{number}" for number in range(5))
COUNTS = (10, 30, 20, 50, 40)
NUM_ROUNDS = 3
NAMES = {"fc.weight": "w", "fc.bias": "b"}
CONFIG: dict[str, Scalar] = {FLOWER_ARRAYS: names_to_text(NAMES), "epochs": 9}

MODEL: Parameters = {
    "fc.bias": np.array([0.5, -0.5], np.float32),
    "fc.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "mean": np.ones(2, np.float32),
}


@pytest.fixture(autouse=True)
def _strategies_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent / "apps")


def named(reference: str, **arguments: Scalar) -> FlowerStrategy:
    """Give a strategy under its reference; those of the tests are let in."""
    allowed = [reference] if reference.startswith(MINE) else []
    return FlowerStrategy(StrategyName(reference=reference, arguments=arguments), allowed)


def trained(number: int) -> list[Arrays]:
    """Draw what each device's training comes to in a round, in the app's order."""
    rng = np.random.default_rng(number)
    return [
        [rng.normal(size=MODEL[name].shape).astype(np.float32) for name in NAMES] for _ in DEVICES
    ]


def results_of(model: Parameters, number: int) -> list[Result]:
    """Write the same as updates."""
    layout = Layout.of(model)
    updates = []
    for device, count, arrays in zip(DEVICES, COUNTS, trained(number), strict=True):
        moved = {**model, **dict(zip(NAMES, arrays, strict=True))}
        update = layout.flatten(moved) - layout.flatten(model)
        updates.append(Result(name=device, update=update, num_examples=count))
    return updates


def run(make: Callable[[], FlowerStrategy], *, restarts: bool) -> list[Step]:
    """Take three rounds; with restarts, each call is of a process of its own."""
    steps: list[Step] = []
    strategy, model, state = make(), MODEL, b""
    for number in range(1, NUM_ROUNDS + 1):
        told = {"number": number, "state": state, "model": model, "config": CONFIG}
        strategy = make() if restarts else strategy
        instructions = strategy.configure(**told, devices=DEVICES)
        assert sorted(instructions.devices) == sorted(DEVICES)
        assert instructions.training.keys() >= CONFIG.keys()
        strategy = make() if restarts else strategy
        results = results_of(model, number)
        steps.append(strategy.aggregate(**told, devices=DEVICES, results=results, failures={}))
        model, state = steps[-1].parameters, steps[-1].state
    return steps


def flower_says(reference: str, arguments: Mapping[str, Any]) -> Arrays:
    """Take the same rounds as Flower does."""
    module, _, name = reference.partition(":")
    first = [MODEL[name] for name in NAMES]

    def train(number: int, _: Arrays) -> list[tuple[Arrays, int]]:
        return list(zip(trained(number), COUNTS, strict=True))

    if module == NEWER:
        strategy = getattr(newer, name)(**arguments)
        return drive_newer(strategy, first, train, num_rounds=NUM_ROUNDS)
    strategy = getattr(older, name)(initial_parameters=ndarrays_to_parameters(first), **arguments)
    return drive_older(strategy, first, train, num_rounds=NUM_ROUNDS)


ARGUMENTS: dict[str, dict[str, Scalar]] = {
    "FedAvg": {},
    "FedAvgM": {"server_momentum": 0.7, "server_learning_rate": 0.5},
    "FedProx": {"proximal_mu": 0.25},
    "FedAdagrad": {"eta": 0.2, "tau": 0.1},
    "FedAdam": {"eta": 0.2, "tau": 0.1},
    "FedYogi": {"eta": 0.2, "tau": 0.1},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.2},
    "Krum": {},
    "MultiKrum": {"num_nodes_to_select": 2},
    "Bulyan": {},
}
OWN_ARGUMENTS: dict[tuple[str, str], dict[str, Scalar]] = {
    ("flwr.server.strategy", "Bulyan"): {"to_keep": 0},  # its Krum fails without it
    ("flwr.server.strategy", "Krum"): {"num_malicious_clients": 1, "num_clients_to_keep": 3},
    ("flwr.serverapp.strategy", "Krum"): {"num_malicious_nodes": 1},
    ("flwr.serverapp.strategy", "MultiKrum"): {"num_malicious_nodes": 1, "num_nodes_to_select": 2},
}


@pytest.mark.parametrize("reference", sorted(BUILT_IN))
def test_steps_are_flowers(reference: str) -> None:
    """Each strategy that is let in makes of three rounds what Flower makes, restarted or not."""
    module, _, name = reference.partition(":")
    arguments = OWN_ARGUMENTS.get((module, name), ARGUMENTS[name])
    expected = flower_says(reference, arguments)
    steps = run(lambda: named(reference, **arguments), restarts=False)
    for ours, array in zip(NAMES, expected, strict=True):
        np.testing.assert_allclose(steps[-1].parameters[ours], array, rtol=2e-5, atol=2e-6)
    assert not np.array_equal(steps[-1].parameters["fc.weight"], MODEL["fc.weight"])
    np.testing.assert_array_equal(steps[-1].parameters["mean"], MODEL["mean"])
    again = run(lambda: named(reference, **arguments), restarts=True)
    for step, other in zip(steps, again, strict=True):
        assert step.state == other.state
        for key, value in step.parameters.items():
            np.testing.assert_array_equal(value, other.parameters[key])


@pytest.mark.parametrize(
    ("reference", "arguments"),
    [(f"{MINE}:Recorder", {"first_rate": 0.3}), (f"{MINE}:clipped", {"server_momentum": 0.5})],
)
def test_own_strategies_outlive_the_coordinator(
    reference: str, arguments: dict[str, Scalar]
) -> None:
    """A user's subclass or wrapper keeps its lists, dicts and inner strategy through restarts."""
    steps = run(lambda: named(reference, **arguments), restarts=False)
    again = run(lambda: named(reference, **arguments), restarts=True)
    for step, other in zip(steps, again, strict=True):
        for key, value in step.parameters.items():
            np.testing.assert_allclose(value, other.parameters[key], atol=1e-6)
        assert step.metrics == pytest.approx(other.metrics, abs=1e-5)


def test_recorder_is_told_what_flower_tells() -> None:
    """Round numbers, clients by name, failures and the server's evaluation reach a subclass."""
    strategy = named(f"{MINE}:Recorder")
    told = {"number": 2, "state": b"", "model": MODEL, "config": CONFIG}
    instructions = strategy.configure(**told, devices=DEVICES)
    assert instructions.training == {**CONFIG, "lr": 0.25, "epochs": 2}
    failures = {"site-4": "away for more than 10 s"}
    step = strategy.aggregate(
        **told, devices=DEVICES, results=results_of(MODEL, 1)[:4], failures=failures
    )
    expected = np.average([arrays[0] for arrays in trained(1)[:4]], axis=0, weights=COUNTS[:4])
    np.testing.assert_allclose(step.parameters["fc.weight"], expected, atol=1e-6)
    assert step.metrics == {"rounds": 1, "loss": pytest.approx(np.abs(expected).sum()), "n": 2}
    object_at_work = strategy._live.kind.strategy  # type: ignore[union-attr]
    assert object_at_work.by_client == dict(zip(DEVICES[:4], COUNTS[:4], strict=True))
    [(number, num_results, num_failures, _)] = object_at_work.history
    assert (number, num_results, num_failures) == (2, 4, 1)


def test_newer_strategies_tell_devices() -> None:
    """Configuration of the newer kind reaches the devices beside the campaign's."""
    told = {"number": 2, "state": b"", "model": MODEL, "config": CONFIG, "devices": DEVICES}
    training = named(f"{NEWER}:FedProx", proximal_mu=0.25).configure(**told).training
    assert training == {**CONFIG, "proximal-mu": 0.25, "server-round": 2}
    assert named(f"{MINE}:Scheduled").configure(**told).training["lr"] == 0.05


@pytest.mark.parametrize(
    ("module", "fraction"), [(OLDER, "fraction_fit"), (NEWER, "fraction_train")]
)
def test_strategy_chooses_among_the_cohort(module: str, fraction: str) -> None:
    """A share of the clients is drawn from the devices that it is shown."""
    told = {"number": 1, "state": b"", "model": MODEL, "config": CONFIG, "devices": DEVICES}
    chosen = named(f"{module}:FedAvg", **{fraction: 0.6}).configure(**told).devices
    assert len(chosen) == 3
    assert set(chosen) < set(DEVICES)


@pytest.mark.parametrize(
    ("reference", "arguments", "message"),
    [
        (f"{OLDER}:FedAvg", {"min_available_clients": 6}, "waits for 6 clients, the cohort has 5"),
        (f"{OLDER}:FedAvg", {"min_fit_clients": 6}, "chose none of the 5 devices"),
        (f"{NEWER}:FedAvg", {"min_available_nodes": 6}, "waits for more than the 5 devices"),
        (f"{NEWER}:FedAvg", {"fraction_train": 0.0}, "chose none"),
        (f"{OLDER}:FedMedian", {"no_such": 1}, "TypeError.*no_such"),
        (f"{MINE}:ToldApart", {}, "tells devices different things"),
        (f"{MINE}:OtherModel", {}, "other parameters than the global model's"),
        (f"{MINE}:OwnStart", {}, "starts from parameters of its own"),
        (f"{MINE}:Caller", {}, "calls a device by itself"),
        (f"{MINE}:Picky", {}, "key = a bytes"),
        (f"{MINE}:nothing", {}, "strategies:nothing"),
        (f"{MINE}:ridge", {}, "AttributeError"),
    ],
)
def test_what_a_round_cannot_do_is_refused(
    reference: str, arguments: dict[str, Scalar], message: str
) -> None:
    """A strategy that would wait for ever, or wants what rounds have not, is an error at once."""
    told = {"number": 1, "state": b"", "model": MODEL, "config": CONFIG, "devices": DEVICES}
    with pytest.raises(StrategyError, match=message):
        named(reference, **arguments).configure(**told)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nothing", "made no parameters"),
        ("raise", "failed: KeyError: 'accuracy'"),
        ("exit", "failed: SystemExit"),
        ("shape", r"'w' came back in shape \(1, 2, 3\)"),
        ("nan", "NaN or infinity"),
    ],
)
def test_failing_step(fault: str, message: str) -> None:
    """Whatever a strategy does instead of a step is one kind of error; the next try starts anew."""
    strategy = named(f"{MINE}:Failing", fault=fault)
    told = {"number": 1, "state": b"", "model": MODEL, "config": CONFIG}
    for _ in range(2):
        with pytest.raises(StrategyError, match=message):
            strategy.aggregate(**told, devices=DEVICES, results=results_of(MODEL, 1), failures={})


def test_step_can_be_taken_again() -> None:
    """A step whose outcome was not stored gives the same when it is asked for again."""
    strategy = named(f"{OLDER}:FedAdam")
    told = {"number": 1, "state": b"", "model": MODEL, "config": CONFIG}
    first, second = (
        strategy.aggregate(**told, devices=DEVICES, results=results_of(MODEL, 1), failures={})
        for _ in range(2)
    )
    assert first.state == second.state
    np.testing.assert_array_equal(first.parameters["fc.weight"], second.parameters["fc.weight"])


def test_state_that_is_no_data_is_named() -> None:
    """What cannot be kept hinders nothing until it is missed, and is named then."""
    with pytest.raises(StrategyError, match=r"cannot go on after a restart.*later \(a lock\)"):
        run(lambda: named(f"{MINE}:Stateful"), restarts=True)
    assert len(run(lambda: named(f"{MINE}:Stateful"), restarts=False)) == NUM_ROUNDS


@pytest.mark.parametrize("reference", ["os:system", "strategies:Recorder", "flwr.server:start"])
def test_only_allowed_strategies_are_imported(reference: str) -> None:
    """A name that the coordinator's operator did not let in is refused before it is imported."""
    with pytest.raises(StrategyError, match=f"--strategy {reference}"):
        FlowerStrategy(StrategyName(reference=reference))


@pytest.mark.parametrize("module", [OLDER, NEWER])
def test_one_sum_is_for_those_that_average(module: str) -> None:
    """On one secure sum averaging strategies run, those that compare updates are refused."""

    def require(name: StrategyName, *, num_results: int = 1, sums: bool = True) -> None:
        FlowerStrategy(name, [name.reference]).require_possible(
            MODEL, CONFIG, num_results=num_results, sums=sums
        )

    require(StrategyName(reference=f"{module}:FedAdam"))
    median = StrategyName(reference=f"{module}:FedMedian")
    with pytest.raises(StrategyError, match="looks at single updates"):
        require(median)
    require(median, num_results=3)
    require(median, sums=False)
    recorder = StrategyName(reference=f"{MINE}:Recorder")
    with pytest.raises(StrategyError, match="on_sums = true"):
        require(recorder)
    require(StrategyName(reference=f"{MINE}:Recorder", on_sums=True))
    with pytest.raises(StrategyError, match="holds all updates"):
        require(median, num_results=10**9)


def test_sum_steps_like_its_updates() -> None:
    """FedAdam makes of one weighted mean what it makes of the updates behind it."""
    told = {"number": 1, "state": b"", "model": MODEL, "config": CONFIG}
    results = results_of(MODEL, 1)
    mean = np.average([r.update for r in results], axis=0, weights=COUNTS).astype(np.float32)
    whole = Result(name="all", update=mean, num_examples=sum(COUNTS))
    arguments: dict[str, Scalar] = {"min_fit_clients": 1, "min_available_clients": 1, "tau": 0.1}

    def step(given: Sequence[Result]) -> Parameters:
        strategy = named(f"{OLDER}:FedAdam", **arguments)
        return strategy.aggregate(**told, devices=DEVICES, results=given, failures={}).parameters

    one, many = step([whole]), step(results)
    np.testing.assert_allclose(one["fc.weight"], many["fc.weight"], atol=1e-6)
