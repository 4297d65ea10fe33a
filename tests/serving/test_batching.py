"""Batching: at once when idle, together while busy, fair, and each error its own request's."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from minga.inference.batching import Batcher
from minga.inference.engine import OnnxModel
from minga.inference.errors import BadRequestError, OverloadedError
from minga.inference.pacing import Pace
from tests.serving.conftest import build_model


class Gate(ThreadPoolExecutor):
    """Threads that compute only while the gate is open, and say when one has come to it."""

    def __init__(self, num_threads: int = 1) -> None:
        super().__init__(num_threads)
        self.opened = threading.Event()
        self.opened.set()
        self.num_submitted = 0

    def submit(self, function, /, *arguments):
        self.num_submitted += 1

        def passing():
            self.opened.wait(10)
            return function(*arguments)

        return super().submit(passing)


@pytest.fixture
def gate():
    """One thread behind a gate."""
    with Gate() as threads:
        yield threads
        threads.opened.set()


@pytest.fixture
def load(write_model):
    """Load a model of some bytes."""

    def make(content: bytes, name: str = "scaling") -> OnnxModel:
        return OnnxModel.load(write_model(content, name))

    return make


def row(value: float, rows: int = 1, columns: int = 3) -> dict[str, np.ndarray]:
    """Inputs whose rows all hold a value."""
    return {"input": np.full((rows, columns), value, np.float32)}


def sizes(model: OnnxModel) -> dict[int, int]:
    """How many runs of which number of rows a model has done."""
    stats = model.statistics.snapshot()["batch_stats"]
    return {batch["batch_size"]: batch["compute_infer"]["count"] for batch in stats}


def asking(batcher, model, *requests):
    """Ask in the given order, and give the answers as tasks."""
    return [asyncio.create_task(batcher.run(model, inputs, ())) for inputs in requests]


async def values(tasks) -> list[float]:
    """Give the first value of each answer."""
    return [float(done.outputs["output"].ravel()[0]) for done in await asyncio.gather(*tasks)]


async def test_a_lone_request_runs_at_once(gate, load, models):
    """Nobody is waited for: one request is one run."""
    model = load(models["scaling"](2))
    batcher = Batcher(gate, num_threads=1, max_rows=8)
    for value in (1, 2, 3):
        assert await values(asking(batcher, model, row(value))) == [2 * value]
    assert sizes(model) == {1: 3}


async def test_what_waits_is_computed_together(gate, load, models):
    """While the thread is busy requests gather, up to the rows of a batch; each gets its own."""
    model = load(models["scaling"](2))
    batcher = Batcher(gate, num_threads=1, max_rows=8)
    gate.opened.clear()
    tasks = asking(batcher, model, *(row(value) for value in range(20)))
    await asyncio.sleep(0)
    gate.opened.set()
    assert await values(tasks) == [2 * value for value in range(20)]
    assert sizes(model) == {1: 1, 3: 1, 8: 2}


async def test_half_is_computed_while_others_are_answered(gate, load, models):
    """Where answering takes long, half of who is here, and before the others are answered."""
    model = load(models["deep"](width=512, layers=400), "deep")
    batcher = Batcher(gate, num_threads=1, max_rows=100)
    submitted_when_answered = []

    async def ask() -> None:
        await batcher.run(model, row(1, columns=512), ())
        submitted_when_answered.append(gate.num_submitted)
        time.sleep(0.02)  # the event loop is busy

    await ask()
    gate.opened.clear()
    tasks = [asyncio.create_task(ask()) for _ in range(21)]
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(*tasks)
    assert sizes(model) == {1: 2, 11: 1, 9: 1}
    assert submitted_when_answered == [1, 3] + 20 * [4]


@pytest.mark.parametrize(
    ("least_s", "whole_s", "answers_s", "halves"),
    [
        (0.003, 0.018, 0.006, True),  # 6 ms to answer 64, and about as many to ask again
        (0.003, 0.018, 0.001, False),  # all are back before it pays
        (0.050, 0.055, 0.006, False),  # one run of 64 takes hardly longer than one of 32
        (0.0001, 0.001, 0.006, False),  # it is over before anybody could ask again
    ],
)
def test_halves_where_they_pay(least_s, whole_s, answers_s, halves):
    """Two runs instead of one cost what the shortest takes, and gain the time around answers."""
    pace = Pace(row_s=0.001, max_rows=128, target_s=None)
    pace.note(1, least_s)
    for _ in range(30):
        pace.note(64, whole_s)
        pace.note_answers(64, answers_s)
    assert pace.overlaps is halves
    pace.waiting_rows = 30
    assert pace.next_rows() == (47 if halves else 128)


async def test_requests_keep_their_rows_and_outputs(gate, load, models):
    """Requests of different lengths that want different outputs are parted correctly."""
    model = load(models["sum"](), "sum")
    batcher = Batcher(gate, num_threads=1, max_rows=100)
    gate.opened.clear()
    wanted = [("sum",), (), ("difference",), ("difference", "sum")]
    tasks = []
    for index, names in enumerate(wanted):
        left = np.full((index + 1, 2), index, np.float32)
        inputs = {"left": left, "right": np.ones_like(left)}
        tasks.append(asyncio.create_task(batcher.run(model, inputs, names)))
    await asyncio.sleep(0)
    gate.opened.set()
    for index, (names, done) in enumerate(zip(wanted, await asyncio.gather(*tasks), strict=True)):
        assert set(done.outputs) == set(names or ("sum", "difference"))
        for name, array in done.outputs.items():
            expected = index + 1 if name == "sum" else index - 1
            np.testing.assert_array_equal(array, np.full((index + 1, 2), expected, np.float32))
    assert sizes(model) == {1: 1, 9: 1}


async def test_an_error_is_its_requests_alone(gate, load, models):
    """Of a batch with an index outside the table only that request fails."""
    model = load(models["gathering"](), "gathering")
    batcher = Batcher(gate, num_threads=1, max_rows=100)
    gate.opened.clear()
    indices = [0, 1, 2, 7, 1, 0, 9, 2]
    tasks = asking(batcher, model, *({"input": np.array([index])} for index in indices))
    await asyncio.sleep(0)
    gate.opened.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    for index, answer in zip(indices, answers, strict=True):
        if index < 3:
            assert answer.outputs["output"].tolist() == [index + 1]
        else:
            assert isinstance(answer, BadRequestError)


async def test_a_request_that_does_not_fit_the_model_never_joins(gate, load, models):
    """A wrong shape is refused before it waits, and the others do not notice."""
    model = load(models["scaling"](2))
    batcher = Batcher(gate, num_threads=1, max_rows=8)
    gate.opened.clear()
    bad, *good = asking(batcher, model, row(1, columns=4), row(2), row(3))
    with pytest.raises(BadRequestError, match="shape"):
        await bad
    gate.opened.set()
    assert await values(good) == [4, 6]


async def test_models_take_turns(gate, load, models):
    """A crowd at one model delays a request to another by a batch, not by its queue."""
    crowded = load(models["scaling"](2), "crowded")
    quiet = load(models["scaling"](3), "quiet")
    batcher = Batcher(gate, num_threads=1, max_rows=4)
    gate.opened.clear()
    crowd = asking(batcher, crowded, *(row(value) for value in range(40)))
    lone = asking(batcher, quiet, row(1))
    finished = []
    for name, tasks in (("crowd", crowd), ("lone", lone)):
        for task in tasks:
            task.add_done_callback(lambda _, name=name: finished.append(name))
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(*crowd, *lone)
    assert finished.index("lone") <= 1 + 4


async def test_the_oldest_goes_first_and_a_large_request_is_not_passed(gate, load, models):
    """A request larger than a batch runs alone in its turn; those behind it do not overtake."""
    model = load(models["scaling"](1))
    batcher = Batcher(gate, num_threads=1, max_rows=4)
    gate.opened.clear()
    order = []
    requests = [row(0), row(1), row(2, rows=50), row(3), row(4)]
    tasks = asking(batcher, model, *requests)
    for index, task in enumerate(tasks):
        task.add_done_callback(lambda _, index=index: order.append(index))
    await asyncio.sleep(0)
    gate.opened.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3, 4]
    assert sizes(model) == {1: 2, 2: 1, 50: 1}


async def test_a_caller_that_left_is_not_computed(gate, load, models):
    """A cancelled request leaves its batch, and the others are answered."""
    model = load(models["scaling"](2))
    batcher = Batcher(gate, num_threads=1, max_rows=8)
    gate.opened.clear()
    tasks = asking(batcher, model, *(row(value) for value in range(5)))
    await asyncio.sleep(0)
    tasks.pop(2).cancel()
    await asyncio.sleep(0)
    gate.opened.set()
    assert await values(tasks) == [0, 2, 6, 8]
    assert sizes(model) == {1: 1, 3: 1}


async def test_shapes_that_differ_are_not_joined(gate, load, models):
    """Images of two sizes are two batches."""
    model = load(models["image"](), "image")
    assert model.is_rowwise
    batcher = Batcher(gate, num_threads=1, max_rows=100)
    gate.opened.clear()
    requests = [{"input": np.ones((1, 1, side, side), np.float32)} for side in (3, 4, 3, 4, 3)]
    tasks = asking(batcher, model, *requests)
    await asyncio.sleep(0)
    gate.opened.set()
    shapes = [done.outputs["output"].shape for done in await asyncio.gather(*tasks)]
    assert shapes == [(1, 1, side, side) for side in (1, 2, 1, 2, 1)]
    assert sizes(model) == {1: 1, 2: 2}


def mixing_model() -> bytes:
    """A model whose rows depend on each other: output = input - mean over the batch."""
    axes = numpy_helper.from_array(np.array([0], np.int64), "axes")
    return build_model(
        [
            helper.make_node("ReduceMean", ["input"], ["mean"], axes=[0], keepdims=1),
            helper.make_node("Sub", ["input", "mean"], ["output"]),
        ],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3])],
        [axes],
    )


async def test_a_model_that_mixes_rows_is_never_batched(gate, load, models):
    """What one caller sends must not change another's answer, so such a model runs one by one."""
    model = load(mixing_model(), "mixing")
    assert not model.is_rowwise
    batcher = Batcher(gate, num_threads=1, max_rows=100)
    gate.opened.clear()
    tasks = asking(batcher, model, row(1), row(5), row(9))
    await asyncio.sleep(0)
    gate.opened.set()
    assert await values(tasks) == [0, 0, 0]
    assert sizes(model) == {1: 3}


@pytest.mark.parametrize("kind", ["sum", "gathering", "image", "deep", "dividing"])
def test_usual_models_are_batched(kind, load, models):
    """Networks and tables give a row the same whatever is beside it."""
    assert load(models[kind](), kind).is_rowwise


async def test_under_load_each_answer_is_of_its_own_request(load, models):
    """Hundreds of callers at once on two threads: every answer fits its question."""
    model = load(models["scaling"](2))
    with ThreadPoolExecutor(2) as threads:
        batcher = Batcher(threads, num_threads=2, max_rows=16)
        tasks = asking(batcher, model, *(row(value, rows=value % 5) for value in range(600)))
        answers = await asyncio.gather(*tasks)
    for value, done in enumerate(answers):
        np.testing.assert_array_equal(done.outputs["output"], row(2 * value, value % 5)["input"])
    assert sum(size * count for size, count in sizes(model).items()) == sum(
        value % 5 for value in range(600)
    )


@pytest.mark.parametrize("row_s", [0.0001, 0.001, 0.02])
def test_batches_grow_to_what_is_in_time(row_s):
    """With 10 ms for a batch and so long per row, the rows settle below what that allows."""
    pace = Pace(row_s=1.0, max_rows=64, target_s=0.01)
    sizes = []
    for _ in range(200):
        pace.note(pace.max_rows, pace.max_rows * row_s)
        sizes.append(pace.max_rows)
    fitting = min(max(int(0.01 / row_s), 1), 64)
    assert max(sizes[-50:]) <= fitting + 1
    assert min(sizes[-50:]) >= fitting // 2
    assert pace.estimate_s(2) == pytest.approx(2 * row_s, rel=0.01)


def test_without_a_target_batches_are_as_large_as_they_may_be():
    """Late and early batches change nothing."""
    pace = Pace(row_s=1.0, max_rows=64, target_s=None)
    for seconds in (100, 0):
        pace.note(64, seconds)
    assert pace.max_rows == 64


async def test_a_request_that_would_be_late_is_refused_at_once(gate, load, models):
    """When what waits takes as long as the objective, more is refused; the rest is answered."""
    model = load(models["deep"](), "deep")
    took_s = model.estimate_s(0)
    batcher = Batcher(gate, num_threads=1, max_rows=1, objective_s=max(10 * took_s, 0.5))
    gate.opened.clear()
    num_asked = int(4 * max(10 * took_s, 0.5) / took_s)
    tasks = asking(batcher, model, *(row(1, columns=512) for _ in range(num_asked)))
    await asyncio.sleep(0)
    refused = [task for task in tasks if task.done()]
    gate.opened.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert refused
    for task in refused:
        with pytest.raises(OverloadedError) as refusal:
            task.result()
        assert refusal.value.retry_after_s > 0
    assert any(not isinstance(answer, BaseException) for answer in answers)


async def test_what_has_become_late_is_not_computed(gate, load, models):
    """A request that waited for too long is refused instead, and nobody waits for it."""
    model = load(models["scaling"](2))
    batcher = Batcher(gate, num_threads=1, max_rows=8, objective_s=0.05)
    gate.opened.clear()
    tasks = asking(batcher, model, *(row(value) for value in range(5)))
    await asyncio.sleep(0.1)
    gate.opened.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert answers[0].outputs["output"][0, 0] == 0, "it was being computed"
    assert all(isinstance(answer, OverloadedError) for answer in answers[1:])
    assert sizes(model) == {1: 1}
    assert await values(asking(batcher, model, row(3))) == [6]


OBJECTIVE_S = 0.15
IN_TIME_S = 2 * OBJECTIVE_S  # what the machine's other work may add
BEGINNING_S = 3 * OBJECTIVE_S  # until then a queue of any kind is short
REQUEST = row(1, rows=8, columns=512)


async def capacity(model, *, seconds):
    """Let eight callers ask again as soon as they are answered; give the answers a second."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    with ThreadPoolExecutor(1) as threads:
        batcher = Batcher(threads, num_threads=1, max_rows=32)

        async def ask_again() -> int:
            answered = 0
            while loop.time() < end:
                await batcher.run(model, REQUEST, ())
                answered += 1
            return answered

        return sum(await asyncio.gather(*(ask_again() for _ in range(8)))) / seconds


async def flood(model, *, objective_s, rate, seconds):
    """Ask so many times a second; give how many a second were in time, and all refusals.

    The beginning is not counted.
    """
    in_time, refused = 0, 0
    with ThreadPoolExecutor(1) as threads:
        batcher = Batcher(threads, num_threads=1, max_rows=32, objective_s=objective_s)
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def ask() -> None:
            nonlocal in_time, refused
            begun = loop.time()
            try:
                await batcher.run(model, REQUEST, ())
            except OverloadedError:
                refused += 1
            else:
                now = loop.time()
                in_time += now - begun <= IN_TIME_S and now - start > BEGINNING_S

        tasks = []
        while (now := loop.time()) < start + BEGINNING_S + seconds:
            while len(tasks) < (now - start) * rate:
                tasks.append(asyncio.create_task(ask()))
            await asyncio.sleep(0.002)
        answered = in_time
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return answered / seconds, refused


@pytest.mark.slow
async def test_overload_does_not_collapse(load, models):
    """Asked for three times what it can do, it goes on in time; without shedding it does not.

    What it can do is measured beside it, as callers see it. Other work may disturb a turn, but
    not five; a collapse shows in each.
    """
    model = load(models["deep"](width=512, layers=48), "deep")
    turns = []
    for _ in range(5):
        most = await capacity(model, seconds=0.5)
        shed, refused = await flood(model, objective_s=OBJECTIVE_S, rate=3 * most, seconds=1)
        queued, _ = await flood(model, objective_s=None, rate=3 * most, seconds=1)
        if refused and shed > 0.5 * most and shed > 2 * queued:
            return
        turns.append({"most": most, "shed": shed, "refused": refused, "queued": queued})
    pytest.fail(f"overload collapsed in each turn: {turns}")
