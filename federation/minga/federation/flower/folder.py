"""What a project folder says of its Flower app; flwr is loaded when the app is made.

Two files may say it, and each may be there alone:

- `minga.toml`: `[federation.flower] client_app = "module:attribute"`;
- `pyproject.toml`, as Flower's own tools read it: `[tool.flwr.app.components] clientapp = ...`, and
  `[tool.flwr.app.config]`, the run's configuration.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from minga.federation.errors import TrainerError
from minga.federation.trainer import LocalTrainer, Scalar

TRAINER: Final = "minga.federation.flower.folder:trainer_from_options"
"""How a device names what runs a Flower app."""

CLIENT_APP: Final = "client_app"
PROJECT: Final = "project"


def trainer_from_options(options: Mapping[str, Scalar]) -> LocalTrainer:
    """Make the trainer of a device; see `app.from_options` for options and errors.

    Raises:
        TrainerError: flwr is not installed, and as there.
    """
    try:
        from minga.federation.flower import app  # noqa: PLC0415 - loads flwr
    except ImportError as error:
        raise TrainerError(
            f"a Flower app needs flwr ({error}); install it with: pip install 'minga[flower]'"
        ) from error
    return app.from_options(options)


def client_app_of(project: Path) -> str:
    """Give the app that a folder names as `module:attribute`; empty if it names none.

    Raises:
        TrainerError: a file cannot be read, or does not name the app as text.
    """
    named = _inside(_read(project / "minga.toml"), "federation", "flower").get(CLIENT_APP)
    if named is None:
        named = _inside(_read(project / "pyproject.toml"), *_APP, "components").get("clientapp", "")
    if not isinstance(named, str):
        raise TrainerError(f'{project} names its Flower app as {named!r}; write "module:attribute"')
    return named


def run_config_of(project: Path) -> dict[str, Scalar]:
    """Give the run's configuration, tables in it flattened: `[a] b = 1` is `a.b`.

    Raises:
        TrainerError: the file cannot be read, or a value is neither text, number nor truth.
    """
    return _flat(_inside(_read(project / "pyproject.toml"), *_APP, "config"), "")


_APP = ("tool", "flwr", "app")


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TrainerError(f"{file} cannot be read: {error}") from error


def _inside(document: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    for name in path:
        document = document.get(name, {})
        if not isinstance(document, Mapping):
            raise TrainerError(f"{'.'.join(path)} is no table")
    return document


def _flat(table: Mapping[str, Any], prefix: str) -> dict[str, Scalar]:
    flat: dict[str, Scalar] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + name] = value
        else:
            raise TrainerError(
                f"{'.'.join(_APP)}.config.{prefix}{name} is {value!r}; "
                "Flower takes text, numbers and truth values"
            )
    return flat
