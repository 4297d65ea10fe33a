"""The child process that trains: frames, errors, death."""

import asyncio
import fcntl
import os
import signal
import sys
import termios
from array import array
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from minga.federation.analytics import Part, Question
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.errors import TrainerError
from minga.federation.parameters import to_bytes

FOLDER = Path(__file__).parent
MIN_UNREAD_BYTES = 4096
"""More than a frame's header."""
PARAMETERS = {"w": np.ones((2, 3), np.float32), "b": np.zeros(4, np.float32)}


@pytest.fixture(autouse=True)
def _trainer_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FOLDER), prepend=os.pathsep)


@pytest.fixture
async def trainer() -> AsyncIterator[TrainerProcess]:
    process = TrainerProcess("constant_trainer:make", {"step": 0.25, "num_examples": 7})
    yield process
    await process.close()


async def test_fit_in_child(trainer: TrainerProcess) -> None:
    """An update comes back with its shapes, count and metrics, whatever user code prints."""
    update = await trainer.fit(PARAMETERS, {"epochs": 1})
    assert update.num_examples == 7
    assert update.metrics == {"step": 0.25}
    np.testing.assert_array_equal(update.delta["w"], np.full((2, 3), 0.25, np.float32))


async def test_options_are_on_no_command_line() -> None:
    """A source may hold a password, and every user of a machine reads its command lines."""
    process = TrainerProcess("constant_trainer:make", {"step": 0.25, "source": "db://a:hush@b"})
    await process.num_examples()
    command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    await process.close()
    assert b"constant_trainer:make" in command
    assert b"hush" not in command


async def test_fit_from_a_file(trainer: TrainerProcess, tmp_path: Path) -> None:
    """The child reads a model from a file, and may write into what it was given."""
    model = tmp_path / "model.safetensors"
    model.write_bytes(to_bytes({"scalar": np.float32(1), "void": np.ones((0, 3)), **PARAMETERS}))
    update = await trainer.fit(model, {})
    assert {name: part.shape for name, part in update.delta.items()} == {
        "b": (4,),
        "scalar": (),
        "void": (0, 3),
        "w": (2, 3),
    }
    np.testing.assert_array_equal(update.vector, np.full(11, 0.25, np.float32))


async def test_evaluate_reuses_the_child(trainer: TrainerProcess) -> None:
    """The child stays warm between calls."""
    first = await trainer.evaluate(PARAMETERS, {})
    pid = trainer.pid
    assert await trainer.evaluate(PARAMETERS, {}) == first == {"sum": 6.0}
    assert trainer.pid == pid


async def test_second_set_of_tensors_travels() -> None:
    """A correction goes to the child, a gradient comes back; a new model is made there."""
    trainer = TrainerProcess("learning_trainer:make", {})
    correction = {"w": np.full((2, 3), 0.5, np.float32)}
    update = await trainer.fit_corrected(PARAMETERS, {}, correction)
    np.testing.assert_array_equal(update.delta["w"], np.full((2, 3), -2.5))
    np.testing.assert_array_equal(update.delta["b"], np.full(4, -2.0))
    assert update.gradient is not None
    np.testing.assert_array_equal(update.gradient["w"], np.full((2, 3), 2.0))
    assert (await trainer.initial({"size": 3}))["head"].shape == (3,)
    assert await trainer.num_examples() is None
    await trainer.close()


async def test_question_is_answered_in_the_child(trainer: TrainerProcess) -> None:
    """Means of columns come back, the rows do not; a trainer without columns says so."""
    question = Question(parts=(Part(column="heat", low=0.0, high=10.0, edges=(2.0,)),))
    columns = TrainerProcess("columns_trainer:make", {"heat": "1,nan,4,10"})
    vector, num_rows = await columns.answer(question)
    assert num_rows == 4
    np.testing.assert_allclose(vector, [3 / 4, 1.5 / 4, 1.17 / 4, 1 / 4, 2 / 4])
    await columns.close()
    with pytest.raises(TrainerError, match="`columns`"):
        await trainer.answer(question)


async def test_trainer_without_the_ability(trainer: TrainerProcess) -> None:
    """What a trainer does not offer is asked for by name; its count it has."""
    with pytest.raises(TrainerError, match="fit_corrected"):
        await trainer.fit_corrected(PARAMETERS, {}, {})
    with pytest.raises(TrainerError, match="initial"):
        await trainer.initial({})
    assert await trainer.num_examples() == 7


async def test_user_code_raises() -> None:
    """An exception of user code is a TrainerError that names it; the child lives on."""
    trainer = TrainerProcess("constant_trainer:make", {"fail": "no data for sensor 3"})
    with pytest.raises(TrainerError, match="ValueError: no data for sensor 3"):
        await trainer.fit(PARAMETERS, {})
    assert trainer.pid is not None
    await trainer.close()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("constant_trainer", "package.module:attribute"),
        ("constant_trainer:nothing", "cannot be loaded"),
        ("no_such_module:make", "cannot be loaded"),
    ],
)
async def test_bad_reference(reference: str, message: str) -> None:
    """A trainer that cannot be loaded says so at the first call."""
    with pytest.raises(TrainerError, match=message):
        await TrainerProcess(reference, {}).fit(PARAMETERS, {})


async def test_killed_child(trainer: TrainerProcess) -> None:
    """A child that dies is an error; the next call starts a new one."""
    await trainer.evaluate(PARAMETERS, {})
    assert trainer.pid is not None
    os.kill(trainer.pid, signal.SIGKILL)
    with pytest.raises(TrainerError, match="died"):
        await trainer.fit(PARAMETERS, {})
    assert (await trainer.fit(PARAMETERS, {})).num_examples == 7


ORPHAN = """
import asyncio, sys
import numpy as np
from minga.federation.device.trainer_process import TrainerProcess

async def main():
    trainer = TrainerProcess("constant_trainer:make", {"delay_s": 600.0})
    await trainer.evaluate({"w": np.ones(2, np.float32)}, {})
    training = asyncio.create_task(trainer.fit({"w": np.ones(2, np.float32)}, {}))
    print(trainer.pid, flush=True)
    await training

asyncio.run(main())
"""


@pytest.mark.slow
async def test_killed_agent_leaves_no_child() -> None:
    """A child ends with its agent, also in the middle of training and however the agent ends."""
    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ORPHAN, stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    child = os.pidfd_open(int(await agent.stdout.readline()))
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(child, ended.set)
    try:
        agent.kill()
        await asyncio.wait_for(ended.wait(), 30)
    finally:
        asyncio.get_running_loop().remove_reader(child)
        os.close(child)
        await agent.wait()


async def test_cancelled_call_ends_the_child() -> None:
    """Cancelling a call kills the training that runs."""
    trainer = TrainerProcess("constant_trainer:make", {"delay_s": 600.0})
    await trainer.evaluate(PARAMETERS, {})
    task = asyncio.create_task(trainer.fit(PARAMETERS, {}))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert trainer.pid is None


async def test_cancelled_in_a_large_answer() -> None:
    """A call that is cancelled while its answer comes in ends, however much of it is unread."""
    trainer = TrainerProcess("constant_trainer:make", {})
    call = asyncio.create_task(trainer.fit({"w": np.zeros(2_000_000, np.float32)}, {}))
    async with asyncio.timeout(60):
        while not unread_bytes(trainer):
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    assert trainer.pid is None


def unread_bytes(trainer: TrainerProcess) -> int:
    """Count what the child has written of an answer that nobody has read yet."""
    if trainer._child is None:
        return 0
    count = array("i", [0])
    fcntl.ioctl(trainer._child._answers, termios.FIONREAD, count)
    return count[0] if count[0] >= MIN_UNREAD_BYTES else 0
