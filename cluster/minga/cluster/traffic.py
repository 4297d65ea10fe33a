"""Requests that keep flowing to a served model, with every failure counted on the client's side."""

import threading
import time
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from minga.inference.client import InferenceClient
from minga.inference.errors import InferenceError
from minga.inference.protocol import InferRequest
from minga.training.export import INPUT


@dataclass(slots=True)
class Tally:
    """What the client saw."""

    num_requests: int = 0
    num_failures: int = 0
    first_failure: str = ""
    versions: list[str] = field(default_factory=list)
    """The versions that answered, in the order of their first answer."""
    latencies_s: list[float] = field(default_factory=list)


class Traffic:
    """Sends one request after the other from a thread, for as long as the context lasts.

    Args:
        url: the server.
        model: whom to ask.
        inputs: rows to ask about, shape `(n, ...)`; each request takes the next one.
        pause_s: between an answer and the next request, to leave the cores to others.
    """

    def __init__(
        self, url: str, model: str, inputs: NDArray[np.float32], *, pause_s: float = 0.02
    ) -> None:
        self.tally = Tally()
        self._url = url
        self._model = model
        self._inputs = inputs
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="minga-traffic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with InferenceClient(self._url) as client:
            while not self._stop.wait(self._pause_s):
                self._ask(client)

    def _ask(self, client: InferenceClient) -> None:
        tally = self.tally
        row = tally.num_requests % len(self._inputs)
        request = InferRequest(inputs={INPUT: self._inputs[row : row + 1]}, binary_outputs=True)
        tally.num_requests += 1
        start = time.perf_counter()
        try:
            answer = client.request(self._model, request)
        except InferenceError as error:
            tally.num_failures += 1
            tally.first_failure = tally.first_failure or str(error)
            return
        tally.latencies_s.append(time.perf_counter() - start)
        if answer.model_version not in tally.versions:
            tally.versions.append(answer.model_version)
