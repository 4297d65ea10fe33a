"""The agent's handle on the child process that trains."""

import asyncio
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.federation.analytics import Question
from minga.federation.device.trainer_host import PREFIX_BYTES, head_size, pack_frame
from minga.federation.errors import TrainerError
from minga.federation.parameters import Parameters, from_bytes, to_bytes
from minga.federation.parts import split_control, with_control
from minga.federation.trainer import Scalar, Update


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
            json.dumps(dict(options)),
        ]
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        return None if self._process is None else self._process.pid

    async def fit(self, parameters: Parameters, config: Mapping[str, Scalar]) -> Update:
        """Train in the child.

        Raises:
            TrainerError: user code raised, or the child died.
        """
        return _update(*await self._call("fit", parameters, config))

    async def fit_corrected(
        self, parameters: Parameters, config: Mapping[str, Scalar], correction: Parameters
    ) -> Update:
        """Train in the child with a correction of each step's gradient; raises as `fit` does."""
        both = with_control(parameters, correction)
        return _update(*await self._call("fit_corrected", both, config))

    async def answer(self, question: Question) -> tuple[NDArray[np.float32], int]:
        """Let the child answer a question about its data; raises as `fit` does.

        Returns:
            The vector of means, and over how many rows.
        """
        asked = json.dumps(asdict(question))
        header, body = await self._call("answer", {}, {"question": asked})
        return from_bytes(body)["answer"], int(header["num_rows"])

    async def initial(self, config: Mapping[str, Scalar]) -> Parameters:
        """Let the child make untrained parameters; raises as `fit` does."""
        _, body = await self._call("initial", {}, config)
        return from_bytes(body)

    async def evaluate(
        self, parameters: Parameters, config: Mapping[str, Scalar]
    ) -> Mapping[str, float]:
        """Evaluate in the child; raises as `fit` does."""
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
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.kill()
            # Not `wait`: it also waits for the end of the child's output, which is never seen while
            # more than 128 KiB of an answer lie there and nobody reads on.
            await process.communicate()

    async def _call(
        self, call: str, parameters: Parameters, config: Mapping[str, Scalar]
    ) -> tuple[dict[str, Any], bytes]:
        async with self._lock:
            try:
                process = self._process or await self._start()
                frame = pack_frame({"call": call, "config": dict(config)}, to_bytes(parameters))
                return await _exchange(process, frame)
            except TrainerError:
                raise
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                await self.close()
                raise TrainerError("the training process died; its log says why") from error
            except BaseException:  # between two frames nobody knows what comes next
                await self.close()
                raise

    async def _start(self) -> asyncio.subprocess.Process:
        # One thread: several agents or a serving process may share the machine's cores.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=environment,
        )
        try:
            await _receive(self._process)
        except TrainerError:
            await self.close()
            raise
        return self._process


def _update(header: Mapping[str, Any], body: bytes) -> Update:
    delta, gradient = split_control(from_bytes(body))
    return Update(
        delta=delta,
        num_examples=int(header["num_examples"]),
        metrics=header["metrics"],
        gradient=gradient,
    )


async def _exchange(
    process: asyncio.subprocess.Process, frame: bytes
) -> tuple[dict[str, Any], bytes]:
    assert process.stdin is not None
    process.stdin.write(frame)
    await process.stdin.drain()
    return await _receive(process)


async def _receive(process: asyncio.subprocess.Process) -> tuple[dict[str, Any], bytes]:
    """Read one frame.

    Raises:
        TrainerError: the child reports an error.
        asyncio.IncompleteReadError: the child died.
    """
    assert process.stdout is not None
    prefix = await process.stdout.readexactly(PREFIX_BYTES)
    header = json.loads(await process.stdout.readexactly(head_size(prefix)))
    body = await process.stdout.readexactly(header["size"])
    if "error" in header:
        raise TrainerError(header["error"])
    return header, body
