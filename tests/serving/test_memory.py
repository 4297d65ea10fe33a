"""Models beyond the memory: they sleep, wake when asked for, and are never taken from a request."""

import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minga.inference import repository as repository_module
from minga.inference.app import InferenceApp
from minga.inference.client import InferenceClient
from minga.inference.errors import AsleepError, ModelError, OverloadedError
from minga.inference.repository import ModelRepository
from tests.serving.conftest import deep_model, ref_of, scaling_model
from tests.serving.test_app import assert_refused, connect

ROWS = {"input": np.ones((1, 3), np.float32)}


@pytest.fixture
def refs(write_model, models):
    """Four models, of which the one named by a number multiplies by it; all files are as long."""
    return [write_model(models["scaling"](k), str(k)) for k in range(1, 5)]


@pytest.fixture
def room(refs):
    """Make a repository with room for so many of them."""
    size = Path(refs[0].path).stat().st_size

    def make(count: float) -> ModelRepository:
        return ModelRepository(max_bytes=int(count * size))

    return make


def awake(repository) -> list[str]:
    """Name the models that are in memory."""
    return sorted(model.ref.name for model in repository.awake())


def test_all_answer_and_some_sleep(refs, room):
    """Every model is listed and was tested; only as many as fit are in memory."""
    repository = room(2.5)
    repository.apply(refs)
    assert repository.names() == ("1", "2", "3", "4")
    assert awake(repository) == ["3", "4"]
    with pytest.raises(AsleepError):
        repository.get("1")
    assert repository.wake("1").run(ROWS)["output"][0, 0] == 1
    assert awake(repository) == ["1", "4"]
    assert (repository.num_awakened, repository.num_evicted) == (1, 3)


def test_the_least_recently_used_leaves(refs, room):
    """What was asked for last stays, whatever was loaded first."""
    repository = room(2)
    repository.apply(refs[:2])
    time.sleep(0.002)  # it is told in milliseconds
    repository.get("1").statistics.answered(total_s=0, queue_s=0, input_s=0, output_s=0)
    repository.apply(refs[:3])
    assert awake(repository) == ["1", "3"]


def test_a_version_is_not_taken_from_a_request(refs, room, monkeypatch):
    """Its memory is free when the request ends; until then who needs it waits, or is refused."""
    repository = room(1)
    repository.apply(refs[:2])
    held = repository.get("2")
    monkeypatch.setattr(repository_module, "_ROOM_S", 0.05)
    with pytest.raises(OverloadedError):
        repository.wake("1")
    assert held.run(ROWS)["output"][0, 0] == 2
    monkeypatch.setattr(repository_module, "_ROOM_S", 10)
    with ThreadPoolExecutor(1) as threads:
        waking = threads.submit(repository.wake, "1")
        assert held.run(ROWS)["output"][0, 0] == 2
        assert not waking.done()
        del held
        assert waking.result(10).run(ROWS)["output"][0, 0] == 1


def test_a_model_larger_than_the_memory_is_refused(refs, room):
    """It could never be loaded, which is said when it is declared, with what to change."""
    repository = room(0.5)
    with pytest.raises(ModelError, match="model_memory_mb"):
        repository.apply(refs[:1])
    assert repository.names() == ()


def test_what_wakes_is_checked_again(refs, room):
    """A file that was altered while its model slept is not loaded."""
    repository = room(1)
    repository.apply(refs[:2])
    Path(refs[0].path).write_bytes(scaling_model(9))
    with pytest.raises(ModelError, match="altered"):
        repository.wake("1")
    assert repository.wake("2").run(ROWS)["output"][0, 0] == 2


def test_a_default_that_sleeps_does_not_give_its_name_to_another_version(write_model, models):
    """A name stands for the version declared first, be it in memory or not."""
    first, second = (write_model(models["scaling"](k), version=str(k)) for k in (1, 2))
    repository = ModelRepository(max_bytes=Path(first.path).stat().st_size)
    repository.apply([first, second])
    assert [model.ref for model in repository.awake()] == [second]
    with pytest.raises(AsleepError):
        repository.get("scaling")
    assert repository.wake("scaling").ref == first


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.sampled_from("1234"), max_size=12), room_for=st.integers(1, 4))
def test_in_any_order_each_answers_for_itself_within_the_memory(asked, room_for, refs, room):
    """Whatever is asked for: the right model answers, and memory is never overdrawn."""
    repository = room(room_for)
    repository.apply(refs)
    for name in asked:
        assert repository.wake(name).run(ROWS)["output"][0, 0] == float(name)
        assert len(repository.awake()) <= room_for


async def test_who_asks_a_sleeping_model_waits_for_it(refs, room):
    """Over HTTP nothing shows but time: metadata, readiness, statistics and answers come."""
    repository = room(1)
    repository.apply(refs)
    body = b'{"inputs":[{"name":"input","datatype":"FP32","shape":[1,3],"data":[1,1,1]}]}'
    async with connect(InferenceApp(repository)) as client:
        for name in ("1", "2", "1"):
            assert (await client.get(f"/v2/models/{name}/ready")).status_code == 200
            assert (await client.get(f"/v2/models/{name}")).json()["name"] == name
            answer = await client.post(f"/v2/models/{name}/infer", content=body)
            assert answer.json()["outputs"][0]["data"] == [float(name)] * 3
        stats = (await client.get("/v2/models/1/stats")).json()["model_stats"][0]
        metrics = (await client.get("/metrics")).text
        Path(refs[2].path).unlink()
        assert_refused(await client.post("/v2/models/3/infer", content=body), 503)
    assert stats["inference_count"] == 2, "what it did before it slept is not forgotten"
    assert 'minga_inference_model_awake{model="1",version="1"} 1.0' in metrics
    assert 'minga_inference_model_awake{model="2",version="1"} 0.0' in metrics
    assert "minga_inference_model_wakes_total 3.0" in metrics


def test_many_callers_of_more_models_than_fit_all_get_answers(refs, room, serve):
    """Callers of four models with room for two: each answer is right, and none is refused."""
    repository = room(2)
    repository.apply(refs)
    wrong: list[str] = []

    def call(name: str, url: str) -> None:
        with InferenceClient(url) as client:
            for _ in range(25):
                output = client.infer(name, ROWS)["output"]
                if output[0, 0] != float(name):
                    wrong.append(name)

    with serve(InferenceApp(repository)) as url, ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(call, name, url) for name in "1234" * 2]:
            done.result(60)
    assert not wrong
    assert repository.num_evicted > 2
    assert threading.active_count() < 100


_MEASURE = """
import sys
from pathlib import Path
from minga.inference.engine import ModelRef
from minga.inference.repository import ModelRepository

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def ref(path):
    name, digest = path.rsplit("-", 1)
    return ModelRef(name=Path(name).name, version="1", path=path, sha256=digest)

refs = [ref(path) for path in sys.argv[2:]]
repository = ModelRepository(max_bytes=int(sys.argv[1]) or None)
repository.apply(refs[:1])
before = resident()
repository.apply(refs)
for each in refs:
    repository.wake(each.name)
print(resident() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' /proc")
@pytest.mark.parametrize("room_for", [0, 2], ids=["all-stay", "two-stay"])
def test_a_model_takes_hardly_more_memory_than_its_file(room_for, tmp_path):
    """Models of 16 MB: one more takes at most 1.3 times its file, and a bound on them holds."""
    num_models = 7
    paths = []
    for number in range(num_models):
        ref = ref_of(tmp_path, deep_model(width=2048 - number, layers=1), f"deep{number}")
        target = tmp_path / f"deep{number}-{ref.sha256}"
        paths.append(str(Path(ref.path).rename(target)))
    size = Path(paths[0]).stat().st_size
    words = [sys.executable, "-c", _MEASURE, str(room_for * size), *paths]
    grown = int(subprocess.check_output(words, text=True, timeout=60))
    added = num_models - 1 if room_for == 0 else room_for - 1
    assert grown <= 1.3 * added * size + resource.getpagesize() * 512
