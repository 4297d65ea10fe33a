"""Flower apps as trainers: the same training as by hand, whatever form the app has."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.errors import TrainerError
from minga.federation.flower.arrays import FLOWER_ARRAYS, names_to_text, to_arrays, to_parameters
from minga.federation.flower.folder import (
    TRAINER,
    client_app_of,
    run_config_of,
    trainer_from_options,
)
from minga.federation.parameters import Parameters
from minga.federation.trainer import LocalTrainer, Scalar
from tests.federation.flower.apps import ridge

APPS = Path(__file__).parent / "apps"
MODEL = to_parameters(ridge.initial_weights())
SITE = 1
Here = Callable[[Mapping[str, Scalar]], LocalTrainer]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Makes trainers in this process, whose path is put back."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return trainer_from_options


@asynccontextmanager
async def trainer(app: str, **options: Scalar) -> AsyncIterator[TrainerProcess]:
    """Run an app as a device does, on site 1."""
    given = {"project": str(APPS), "client_app": app, "partition-id": str(SITE), **options}
    process = TrainerProcess(TRAINER, given)
    try:
        yield process
    finally:
        await process.close()


def assert_trained(delta: Parameters, *, epochs: int, rate: float = 0.25) -> None:
    """The update is that of training by hand."""
    expected = ridge.train(
        ridge.initial_weights(), *ridge.load_data(SITE), epochs=epochs, rate=rate
    )
    for before, change, after in zip(to_arrays(MODEL), to_arrays(delta), expected, strict=True):
        assert change.shape == before.shape
        np.testing.assert_allclose(before + change, after, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["app", "client_fn", "RidgeClient", "client"])
async def test_classic_apps_train(name: str) -> None:
    """ClientApp, client_fn, class and object of the classic style give the update made by hand."""
    async with trainer(f"numpy_app:{name}") as process:
        update = await process.fit(MODEL, {"epochs": 3})
        metrics = await process.evaluate(MODEL, {})
    assert_trained(update.delta, epochs=3)
    assert update.num_examples == len(ridge.load_data(SITE)[0])
    assert set(update.metrics) == {"loss"}, "what is no number stays at home"
    assert metrics["loss"] == pytest.approx(
        ridge.loss_of(ridge.initial_weights(), *ridge.load_data(SITE))
    )
    assert metrics["bias"] == pytest.approx(0.55)


async def test_message_app_trains() -> None:
    """Functions of messages, found by the folder's pyproject.toml, with run_config and state."""
    async with trainer("") as process:
        first = await process.fit(MODEL, {"server-round": 4})
        second = await process.fit(MODEL, {"local.epochs": 1, "learning-rate": 0.5})
        metrics = await process.evaluate(MODEL, {})
    assert_trained(first.delta, epochs=2)
    assert first.metrics["round"] == 4
    assert_trained(second.delta, epochs=1, rate=0.5)
    assert (first.metrics["calls"], second.metrics["calls"]) == (1, 2), "the context's state lives"
    loss = ridge.loss_of(ridge.initial_weights(), *ridge.load_data(SITE))
    assert metrics == {"loss": pytest.approx(loss)}


async def test_app_sees_the_arrays_that_the_campaign_names() -> None:
    """An order of names makes the list; tensors left out stay as they are."""
    names = {f"model.{'zyxwvutsrqp'[place]}": str(place) for place in range(ridge.NUM_LAYERS)}
    model = {ours: MODEL[theirs] for ours, theirs in sorted(names.items())} | {
        "preparation.mean": np.ones(4, np.float32)
    }
    config: dict[str, Scalar] = {FLOWER_ARRAYS: names_to_text(names)}
    for app, epochs in (("numpy_app:app", 1), ("message_app:app", 2)):
        async with trainer(app) as process:
            update = await process.fit(model, config)
        delta = update.delta
        assert not delta.pop("preparation.mean").any()
        assert_trained({names[name]: value for name, value in delta.items()}, epochs=epochs)


@pytest.mark.parametrize(
    ("app", "config", "message"),
    [
        (
            "numpy_app:BrokenClient",
            {"fault": "shape"},
            r"'0' came back in shape \(1, 4\), the model's",
        ),
        ("numpy_app:BrokenClient", {"fault": "count"}, "10 arrays came back for the 11"),
        ("numpy_app:BrokenClient", {"fault": "nan"}, "'3' came back with NaN"),
        ("numpy_app:app", {"fail": True}, "no data today"),
        ("message_app:app", {"fail": True}, "replied with error 7"),
        ("numpy_app:app", {FLOWER_ARRAYS: '{"11": "w"}'}, "names '11', which the model does not"),
        ("numpy_app:app", {FLOWER_ARRAYS: "["}, "no JSON"),
        ("numpy_app:app", {FLOWER_ARRAYS: '{"0": "w", "1": "w"}'}, "each once"),
    ],
)
def test_bad_update(app: str, config: Mapping[str, Scalar], message: str, here: Here) -> None:
    """What is no update of this model is an error that says so; nothing is broadcast."""
    flower = here({"project": str(APPS), "client_app": app, "partition-id": str(SITE)})
    with pytest.raises((TrainerError, ValueError), match=message):
        flower.fit(MODEL, config)


async def test_unknown_order_is_refused() -> None:
    """An app that gets a list is never given one in an order that nobody said."""
    model = {"fc.weight": np.ones((2, 2), np.float32), "fc.bias": np.ones(2, np.float32)}
    async with trainer("numpy_app:app") as process:
        with pytest.raises(TrainerError, match=f"order of 2 named tensors.*{FLOWER_ARRAYS}"):
            await process.fit(model, {})


@pytest.mark.parametrize(
    ("app", "options", "message"),
    [
        ("numpy_app:nothing", {}, "of type int; name a ClientApp"),
        ("numpy_app:absent", {}, "'numpy_app:absent' cannot be loaded"),
        ("no_such_module:app", {}, "cannot be loaded"),
        ("numpy_app:RidgeClient", {"partition-id": None}, "--option.partition-id VALUE"),
        ("", {"project": str(APPS.parent)}, "names no Flower app"),
    ],
)
def test_bad_app(app: str, options: dict[str, Any], message: str, here: Here) -> None:
    """An app that cannot be had says why and what to do."""
    given = {"project": str(APPS), "client_app": app, "partition-id": "1", **options}
    with pytest.raises(TrainerError, match=message):
        here({k: v for k, v in given.items() if v is not None})


def test_folder_names_its_app(tmp_path: Path) -> None:
    """minga.toml goes before Flower's own file, whose configuration is flattened."""
    assert client_app_of(APPS) == "message_app:app"
    assert run_config_of(APPS) == {
        "num-server-rounds": 3,
        "learning-rate": 0.25,
        "local.epochs": 2,
    }
    (tmp_path / "pyproject.toml").write_text((APPS / "pyproject.toml").read_text())
    (tmp_path / "minga.toml").write_text('[federation.flower]\nclient_app = "mine:app"\n')
    assert client_app_of(tmp_path) == "mine:app"
    (tmp_path / "minga.toml").write_text("[federation]\nflower = 3\n")
    with pytest.raises(TrainerError, match=r"federation\.flower is no table"):
        client_app_of(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config]\na = [1]\n")
    with pytest.raises(TrainerError, match=r"config\.a is \[1\]"):
        run_config_of(tmp_path)


ALONE = """
import json, sys
sys.addaudithook(lambda event, args: calls.append(event) if event in WATCHED else None)
calls, WATCHED = [], ("socket.connect", "socket.getaddrinfo", "pickle.find_class", "urllib.Request")
from minga.federation.flower.arrays import to_parameters
from minga.federation.flower.folder import trainer_from_options
import flwr.supercore.telemetry as telemetry
trainer = trainer_from_options({"project": sys.argv[1], "partition-id": 1})
sys.path.insert(0, sys.argv[1])
import ridge
trainer.fit(to_parameters(ridge.initial_weights()), {})
print(json.dumps([telemetry.FLWR_TELEMETRY_ENABLED, calls]))
"""


def test_flower_calls_nobody(tmp_path: Path) -> None:
    """Training with an app opens no connection, unpickles nothing, writes nothing to the home."""
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(filter(None, sys.path))}
    output = subprocess.run(
        [sys.executable, "-c", ALONE, str(APPS)],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    ).stdout
    assert json.loads(output) == ["0", []]
    assert not list(tmp_path.iterdir())
