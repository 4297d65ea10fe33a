"""The agent's handle on the child process that trains."""

import asyncio
import fcntl
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from minga.federation.analytics import Question
from minga.federation.device.trainer_host import PREFIX_BYTES, head_size, pack_frame
from minga.federation.errors import TrainerError
from minga.federation.limits import MIB
from minga.federation.parameters import Layout, Parameters, to_bytes
from minga.federation.parts import split_control, with_control
from minga.federation.trainer import Scalar, Update

_PIPE_BYTES: Final = MIB
"""What the pipe for answers holds; Linux' own 64 KiB would make 16 times as many steps of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedUpdate:
    """An `Update` as it came from the child: all tensors in one vector."""

    layout: Layout
    vector: NDArray[np.float32]
    """Shape `(layout.num_values,)`."""
    num_examples: int
    metrics: Mapping[str, float]

    @property
    def delta(self) -> Parameters:
        """The tensors by name; they share the vector's memory."""
        return self.layout.unflatten(self.vector)


class TrainerProcess:
    """A `LocalTrainer` in a process of its own, started on first use and kept warm.

    Calls take turns. Cancelling a call ends the child, since training cannot be interrupted
    otherwise; the next call starts a new one.
    """

    def __init__(self, reference: str, options: Mapping[str, Scalar]) -> None:
        self._command = [
            sys.executable,
            "-m",
            "minga.federation.device.trainer_host",
            reference,
        ]
        # Not on the command line, which every user of the machine reads: a source may hold a
        # password.
        self._options = dict(options)
        self._child: _Child | None = None
        self._lock = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return None if self._child is None else self._child.process.pid

    async def fit(
        self, parameters: Parameters | Path, config: Mapping[str, Scalar]
    ) -> TrainedUpdate:
        """Train in the child.

        Args:
            parameters: What it starts from, or a safetensors file that holds it, which the child
                reads by itself.
            config: What the trainer gets beside.

        Raises:
            TrainerError: user code raised, or the child died.
        """
        header, vector = await self._call("fit", parameters, config)
        return TrainedUpdate(
            layout=_layout(header),
            vector=vector,
            num_examples=int(header["num_examples"]),
            metrics=header["metrics"],
        )

    async def fit_corrected(
        self, parameters: Parameters, config: Mapping[str, Scalar], correction: Parameters
    ) -> Update:
        """Train in the child with a correction of each step's gradient; raises as `fit` does."""
        both = with_control(parameters, correction)
        header, vector = await self._call("fit_corrected", both, config)
        delta, gradient = split_control(_layout(header).unflatten(vector))
        return Update(
            delta=delta,
            num_examples=int(header["num_examples"]),
            metrics=header["metrics"],
            gradient=gradient,
        )

    async def answer(self, question: Question) -> tuple[NDArray[np.float32], int]:
        """Let the child answer a question about its data; raises as `fit` does.

        Returns:
            The vector of means, and over how many rows.
        """
        asked = json.dumps(asdict(question))
        header, vector = await self._call("answer", {}, {"question": asked})
        return vector, int(header["num_rows"])

    async def initial(self, config: Mapping[str, Scalar]) -> Parameters:
        """Let the child make untrained parameters; raises as `fit` does."""
        header, vector = await self._call("initial", {}, config)
        return _layout(header).unflatten(vector)

    async def evaluate(
        self, parameters: Parameters | Path, config: Mapping[str, Scalar]
    ) -> Mapping[str, float]:
        """Evaluate in the child; takes and raises what `fit` does."""
        header, _ = await self._call("evaluate", parameters, config)
        metrics: dict[str, float] = header["metrics"]
        return metrics

    async def num_examples(self) -> int | None:
        """Ask the child how many examples it trains on; None if its trainer does not say.

        Raises:
            TrainerError: user code raised, or the child died.
        """
        header, _ = await self._call("count", {}, {})
        count: int | None = header["num_examples"]
        return count

    async def close(self) -> None:
        """End the child."""
        child, self._child = self._child, None
        if child is not None:
            await child.close()

    async def _call(
        self, call: str, parameters: Parameters | Path, config: Mapping[str, Scalar]
    ) -> tuple[dict[str, Any], NDArray[np.float32]]:
        header: dict[str, Any] = {"call": call, "config": dict(config)}
        body = b""
        if isinstance(parameters, Path):
            header["file"] = str(parameters)
        else:
            body = to_bytes(parameters)
        async with self._lock:
            try:
                child = self._child or await self._start()
                await child.send(pack_frame(header, body))
                return await child.receive()
            except TrainerError:
                raise
            except (EOFError, ConnectionError) as error:
                await self.close()
                raise TrainerError("the training process died; its log says why") from error
            except BaseException:  # between two frames nobody knows what comes next
                await self.close()
                raise

    async def _start(self) -> "_Child":
        self._child = await _Child.start(self._command)
        try:
            await self._child.send(pack_frame({"options": self._options}))
            await self._child.receive()
        except TrainerError:
            await self.close()
            raise
        return self._child


def _layout(header: Mapping[str, Any]) -> Layout:
    shapes = tuple(tuple(shape) for shape in header["shapes"])
    return Layout(names=tuple(header["names"]), shapes=shapes)


class _Child:
    """A running child and the two pipes to it.

    What it answers is read straight into the vector that it becomes: an `asyncio.StreamReader`
    would move a large model through a buffer of its own, a few KiB at a time.
    """

    def __init__(self, process: asyncio.subprocess.Process, answers: int) -> None:
        self.process = process
        self._answers = answers

    @classmethod
    async def start(cls, command: list[str]) -> "_Child":
        """Start a child; it has yet to say that it is ready."""
        answers, its_end = os.pipe()
        try:
            with suppress(OSError):  # the user has as many large pipes as allowed
                fcntl.fcntl(answers, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            os.set_blocking(answers, False)
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=its_end,
                # One thread: several agents or a serving process may share the machine's cores.
                env={"OMP_NUM_THREADS": "1", **os.environ},
            )
        except BaseException:
            os.close(answers)
            raise
        finally:
            os.close(its_end)
        return cls(process, answers)

    async def close(self) -> None:
        """End it."""
        os.close(self._answers)
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def send(self, frame: bytes) -> None:
        """Send one frame.

        Raises:
            ConnectionError: the child died.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(frame)
        await self.process.stdin.drain()

    async def receive(self) -> tuple[dict[str, Any], NDArray[np.float32]]:
        """Read one frame.

        Raises:
            TrainerError: the child reports an error.
            EOFError: the child died.
        """
        prefix = await self._read(PREFIX_BYTES)
        header = json.loads((await self._read(head_size(prefix.tobytes()))).tobytes())
        if "error" in header:
            raise TrainerError(header["error"])
        return header, (await self._read(header["size"])).view(np.float32)

    async def _read(self, size: int) -> NDArray[np.uint8]:
        """Read so many bytes."""
        data = np.empty(size, np.uint8)
        left = data.data
        while left:
            try:
                count = os.readv(self._answers, [left])
            except BlockingIOError:
                await self._readable()
                continue
            if not count:
                raise EOFError("the child closed its end")
            left = left[count:]
        return data

    async def _readable(self) -> None:
        """Wait until there is something to read."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._answers, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._answers)
