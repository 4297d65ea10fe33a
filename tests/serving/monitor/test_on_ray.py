"""On Ray Serve: replicas ship what they count, and windows are judged over all of them."""

import time

import httpx
import pytest

from minga.inference.client import InferenceClient
from minga.inference.monitor.alarms import AlarmLog
from minga.inference.monitor.store import Store
from minga.inference.monitor.summary import summarise
from minga.serving.config import ServingConfig
from tests.serving.watched import rows, watched_model

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "monitor"


@pytest.fixture
def host(ray_cluster, folder):
    """Two replicas with a monitor of small windows."""
    from minga.serving.host import start

    config = ServingConfig.model_validate(
        {
            "port": 0,
            "num_replicas": 2,
            "cpus_per_replica": 0.5,
            "monitor": {"window_rows": 400, "flush_s": 0.1},
        }
    ).watched_in(folder)
    running = start(config, [])
    yield running
    running.stop()


def rows_of(folder) -> int:
    """Count the rows that have come together so far."""
    if not (folder / "monitor.db").is_file():
        return 0
    store = Store(folder)
    states = store.watched()
    total = sum(int(state.open.get("rows", 0)) for state in states)
    total += sum(window.rows for state in states for window in store.windows(state))
    store.close()
    return total


def wait_for_rows(folder, num_rows: int) -> None:
    """Wait until this many rows have come together."""
    deadline = time.monotonic() + 30
    while rows_of(folder) < num_rows:
        assert time.monotonic() < deadline, rows_of(folder)
        time.sleep(0.05)


def test_windows_are_over_all_replicas(host, folder, write_model):
    """Rows of both replicas fill common windows; any scrape has their sum, and the common alarm."""
    host.deploy([write_model(watched_model(), "yes-or-no")])
    host.wait_ready()
    for number in range(3):
        for part in range(40):
            # A connection of its own each, so that both replicas get some.
            with InferenceClient(host.url) as client:
                table = rows(10, 100 * number + part, shift=0.8)
                client.infer("yes-or-no", {"input": table})
        wait_for_rows(folder, 400 * (number + 1))
    store = Store(folder)
    (summary,) = summarise(store)
    store.close()
    assert summary.windows >= 2
    assert summary.rows >= 400
    raised = {(alarm.kind, alarm.subject) for alarm in AlarmLog(folder).read()}
    assert ("drift", "first") in raised
    deadline = time.monotonic() + 20
    told = 0
    while told < 10:  # replicas hear of the alarm one after another
        assert time.monotonic() < deadline
        with httpx.Client() as fresh:
            lines = fresh.get(f"{host.url}/metrics").text.splitlines()
        is_told = any(line.startswith("minga_monitor_standing_alarm{") for line in lines)
        told = told + 1 if is_told and "minga_monitor_rows_total 1200.0" in lines else 0
