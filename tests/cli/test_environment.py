"""Processes that run for long take their settings from the environment where no flag is given."""

import socket
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from minga.cli.app import app, main
from minga.federation.coordinator.settings import CoordinatorSettings
from minga.federation.device.settings import DeviceSettings


@pytest.mark.parametrize(
    ("group", "settings"), [("coordinator", CoordinatorSettings), ("device", DeviceSettings)]
)
def test_every_flag_of_a_setting_has_its_variable(group: str, settings: type[BaseSettings]) -> None:
    """A flag that sets a setting gives way to the setting's variable where it is not given."""
    prefix = settings.model_config["env_prefix"]
    flags = {}
    for argument in app[group]["run"].assemble_argument_collection():
        name = argument.name.removeprefix("--").replace("-", "_")
        for setting in {name, f"{name}_s"} & settings.model_fields.keys():
            flags[(prefix + setting).upper()] = argument.parameter.env_var
    assert len(flags) >= 4
    assert flags == {variable: (variable,) for variable in flags}


@pytest.mark.parametrize(("flags", "wins"), [([], "environment"), (["--port"], "flag")])
def test_a_flag_wins_over_the_environment(
    flags: list[str],
    wins: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The coordinator wants the port of the flag, else that of the environment."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        ports = {"environment": str(one.getsockname()[1]), "flag": str(other.getsockname()[1])}
        monkeypatch.setenv("MINGA_COORDINATOR_STATE", str(tmp_path / "state"))
        monkeypatch.setenv("MINGA_COORDINATOR_PORT", ports["environment"])
        words = ["coordinator", "run", *flags, *([ports["flag"]] if flags else [])]
        with pytest.raises(SystemExit) as ended:
            main(words)
    assert ended.value.code
    assert f"port {ports[wins]} " in capsys.readouterr().err
