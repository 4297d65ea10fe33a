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


def test_a_registry_that_is_away_says_so_without_its_password(monkeypatch) -> None:
    """MLflow's client quotes the whole address; its password is neither shown nor logged."""
    monkeypatch.setenv("MINGA_TRACKING_URI", "http://minga:hush@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    from minga.training.registry import Registry

    with pytest.raises(Exception, match="hush") as raised:
        Registry("http://minga:hush@127.0.0.1:1").names()
    assert exit_code_of(raised.value) == 28
    message = message_of(raised.value)
    assert "hush" not in message
    assert "MINGA_TRACKING_URI" in message


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (PermissionError(13, "Permission denied", "/srv/plant"), "/srv/plant cannot be used: Perm"),
        (OSError(28, "No space left on device"), "cannot be used: No space left on device"),
    ],
    ids=["rights", "space"],
)
def test_files_that_cannot_be_used_are_one_line(error: OSError, words: str) -> None:
    """Whichever command meets it, a wrong folder or a full disk is no bug to report."""
    assert message_of(error).startswith(words)
    assert "\n" not in message_of(error)
    assert exit_code_of(error) == 1


def test_status_of_a_registry_that_is_away_is_a_row_without_its_password(
    monkeypatch, tmp_path
) -> None:
    """What is away is said in its row, and the other parts are asked all the same."""
    from minga.cluster.project import load
    from minga.cluster.status import gather

    monkeypatch.setenv("MINGA_TRACKING_URI", "http://minga:hush@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "minga.toml").write_text('task = "task.py:Task"\n[data]\nsource = "data.csv"\n')
    found = gather(load(tmp_path), tmp_path)
    assert "does not answer" in found["registry"]["note"]
    assert found["federation"]
    assert "hush" not in str(found)
