"""Infra validation: the runtimes that are to load a model do so before it may be promoted.

The exact file, as it is read from where the version's files lie and held against the digest that
the version will have, is given to a fresh process of each runtime, and questions are asked over
HTTP as clients will ask them. What a registry, an exporter or another package's version has broken
shows here and not in production (TFX calls this an InfraValidator: Baylor et al., KDD 2017).
"""

import hashlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from minga.inference.client import InferenceClient
from minga.inference.errors import InferenceError
from minga.inference.trial import READY
from minga.training.candidate import TryOut
from minga.training.export import INPUT, OUTPUT
from minga.training.gates import Trial

RUNTIMES = {"serving": "minga.serving.trial", "device": "minga.federation.device.trial"}
"""Runtime -> the module that is it, in a process of its own."""

END_TIMEOUT_S = 10.0


def runtimes_for(name: str, stage: Callable[[bytes], Path], *, timeout_s: float) -> TryOut:
    """Give what tries a model out in every runtime.

    Args:
        name: of the registered model.
        stage: puts the model where it will be loaded from, and gives that file.
        timeout_s: how long each may take to load the model and to answer.
    """

    def try_out(onnx: bytes, inputs: NDArray[Any], outputs: NDArray[Any]) -> tuple[Trial, ...]:
        digest = hashlib.sha256(onnx).hexdigest()
        words = (str(stage(onnx)), name, digest)
        with tempfile.TemporaryDirectory(prefix="minga-trial-") as folder, ExitStack() as stack:
            children = [
                stack.enter_context(_Child(runtime, module, words, Path(folder)))
                for runtime, module in RUNTIMES.items()
            ]
            deadline = time.monotonic() + timeout_s
            trials = [child.ask(name, inputs, outputs, deadline) for child in children]
        return tuple(
            replace(trial, detail=f"{trial.detail}; sha256 {digest[:12]}") for trial in trials
        )

    return try_out


@dataclass(frozen=True, slots=True)
class _NoAnswerError(Exception):
    """Why a runtime gave no answers."""

    reason: str


class _Child:
    """One runtime's process; it ends with the context."""

    def __init__(self, runtime: str, module: str, words: tuple[str, ...], folder: Path) -> None:
        self._runtime = runtime
        self._log = folder / f"{runtime}.log"
        self._started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own module, no shell
                [sys.executable, "-m", module, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def ask(self, name: str, inputs: NDArray[Any], outputs: NDArray[Any], deadline: float) -> Trial:
        """Wait until it answers, and compare its answers with what they must be."""
        try:
            url = self._url(deadline)
            ready_s = time.monotonic() - self._started
            left_s = max(deadline - time.monotonic(), 0.1)
            with InferenceClient(url, timeout_s=left_s) as client:
                answers = client.infer(name, {INPUT: inputs})[OUTPUT]
        except (_NoAnswerError, InferenceError) as error:
            reason = error.reason if isinstance(error, _NoAnswerError) else str(error)
            return Trial(runtime=self._runtime, error=None, detail=reason)
        if answers.shape != outputs.shape:
            detail = f"it answers with shape {answers.shape}, the export with {outputs.shape}"
            return Trial(runtime=self._runtime, error=None, detail=detail)
        largest = float(np.max(np.abs(answers - outputs), initial=0.0))
        detail = f"{len(inputs)} examples, error {largest:.3g}, up in {ready_s:.1f} s"
        return Trial(runtime=self._runtime, error=largest, detail=detail)

    def _url(self, deadline: float) -> str:
        """Give where it listens, once it says so."""
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert self._process.stdout is not None
        threading.Thread(target=_read, args=(self._process.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                raise _NoAnswerError("it does not answer in trial_timeout_s") from None
            if not line:
                self._process.wait()
                raise _NoAnswerError(f"it ended: {self._last_words()}")
            if line.startswith(READY):
                return line.removeprefix(READY).strip()

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"


def _read(stream: IO[str], lines: "queue.SimpleQueue[str]") -> None:
    """Hand on a stream line by line; an empty one is its end."""
    for line in stream:
        lines.put(line)
    lines.put("")
