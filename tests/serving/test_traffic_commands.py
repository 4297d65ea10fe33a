"""`minga traffic`: asked for in the registry, taken up by a running service, told by status."""

import hashlib
import json
from pathlib import Path

import pytest

from minga.inference.client import InferenceClient
from tests.serving.test_commands import exit_code, project, run, running_serve

__all__ = ["project"]

pytestmark = pytest.mark.slow

BLESSED = {"minga.blessed": "true"}


@pytest.fixture
def candidate(register, models):
    """Register a champion that multiplies by 1 and a version that passed its gates, by 2."""

    def make(name: str) -> str:
        register(name, 1)
        digest = hashlib.sha256(models["scaling"](2)).hexdigest()
        tags = BLESSED | {"minga.onnx_sha256": digest}
        return register(name, 2, alias="challenger", tags=tags)

    return make


def status(capsys, *words: str) -> dict:
    """Give what status tells of each model."""
    capsys.readouterr()
    run("traffic", "status", "--json", *words)
    return {row["model"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_canary_is_asked_for_and_served(candidate, project, load, capsys):
    """One command begins it; a service under load takes it to the end, and stop undoes it."""
    version = candidate("asked")
    folder = project(port=0, poll_interval_s=0.1)
    with (Path(folder) / "minga.toml").open("a", encoding="utf-8") as file:
        file.write("[serving.comparison]\nshares = [0.5]\nmin_requests = 50\nhold_s = 0.0\n")
        file.write("max_latency_ratio = 50.0\n")
    words = ("--project", folder)
    with (
        running_serve("asked", *words, "--engine", "local") as (_, url, _),
        load(url, model="asked") as callers,
        InferenceClient(url) as client,
    ):
        callers.wait_for(1.0)
        run("traffic", "canary", "asked", "@challenger", "--repair", *words)
        callers.wait_for(2.0)
        while status(capsys, *words)["asked"]["status"] != "passed":
            assert not callers.failures
        told = status(capsys, *words)["asked"]
        run("traffic", "stop", "asked", *words)
        while client.metadata("asked")["versions"] != ["1"]:
            assert not callers.failures
    assert callers.failures == []
    assert (told["baseline"], told["challenger"]) == ("1", version)
    assert told["expects"] == "repair"
    assert told["figures"]["challenger"]["requests"] >= 50
    assert "asked" not in status(capsys, *words)


def test_status_is_a_table(candidate, project, capsys):
    """What nobody has taken up yet is told too; without anything, what to type."""
    words = ("--project", project())
    version = candidate("tabled")
    run("traffic", "shadow", "tabled", version, "--share", "0.2", *words)
    run("traffic", "status", *words)
    shown = capsys.readouterr().out
    assert "tabled" in shown
    assert "asked for" in shown
    run("traffic", "stop", "tabled", *words)
    run("traffic", "status", *words)
    assert "minga traffic canary MODEL VERSION" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["canary", "missing", "9"], 27, "no version 9"),
        (["canary", "nobody", "1"], 27, "no champion"),
        (["canary", "champion", "1"], 21, "is champion already"),
        (["split", "unblessed", "2"], 21, "minga traffic shadow"),
        (["stop", "idle"], 21, "nothing is compared"),
    ],
)
def test_what_cannot_be_compared_is_said(*, words, code, message, register, project, capsys):
    """Each is one line with its exit code: also a version that its gates refused."""
    folder = project()
    if words[1] != "nobody":
        register(words[1], 1)
        register(words[1], 2, alias=None)
    assert exit_code("traffic", *words, "--project", folder) == code
    assert message in capsys.readouterr().err
