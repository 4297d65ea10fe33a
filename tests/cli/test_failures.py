"""Which error ends the command with which words and code."""

import importlib

import pytest

from minga.cli.failures import EXIT_CODES, exit_code_of, message_of


@pytest.mark.parametrize("name", EXIT_CODES)
def test_every_listed_error_exists(name: str) -> None:
    """The table knows errors by name; each is a class that an error can have, with its code."""
    module, _, kind = name.rpartition(".")
    error = getattr(importlib.import_module(module), kind)
    assert issubclass(error, Exception)
    assert exit_code_of(error.__new__(error)) == EXIT_CODES[name]


def test_a_missing_package_says_what_to_install() -> None:
    """On a machine with the base install alone, a command that needs more says how to get it."""
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    assert exit_code_of(error) == 3
    assert message_of(error).startswith("torch is not installed")
    assert "pip install 'minga[cluster]'" in message_of(error)


def test_an_unforeseen_error_asks_for_a_report() -> None:
    """What Minga did not foresee names its class and says how to see more."""
    assert exit_code_of(ZeroDivisionError()) == 1
    assert "ZeroDivisionError" in message_of(ZeroDivisionError())
    assert "--debug" in message_of(ZeroDivisionError())
