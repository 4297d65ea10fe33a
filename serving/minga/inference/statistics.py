"""What a version has done since it was loaded: counts and times, as Triton's clients read them.

The fields are those of Triton's statistics extension (triton-inference-server/server,
docs/protocol/extension_statistics.md). One thread writes them: the server's event loop.
"""

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

_LARGEST_EXACT: Final = 1024  # a caller chooses the rows of a request, not how many we remember


@dataclass(slots=True)
class Duration:
    """How often something happened, and for how long in all, in nanoseconds."""

    count: int = 0
    ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count something that took `seconds`, or `count` things that took so long together."""
        self.count += count
        self.ns += int(seconds * 1e9)


@dataclass(slots=True)
class InferDurations:
    """Where the time of requests went."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class BatchDurations:
    """Where the time of batches of one size went."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One run of a model, of which several requests may have been part.

    Attributes:
        rows: the rows of the run.
        input_s: time to join the requests' inputs.
        infer_s: time of the run itself.
        output_s: time to part its outputs.
    """

    rows: int
    input_s: float = 0.0
    infer_s: float
    output_s: float = 0.0

    @property
    def total_s(self) -> float:
        """The time of all of it."""
        return self.input_s + self.infer_s + self.output_s


class Statistics:
    """What one version has done."""

    def __init__(self) -> None:
        self._last_inference_ms = 0
        self._awake_since_s = time.time()
        self._num_inferences = 0
        self._num_executions = 0
        self._requests = InferDurations()
        self._batches: dict[int, BatchDurations] = {}

    @property
    def last_used_s(self) -> float:
        """When a request was answered last, or the version was loaded, in seconds since 1970."""
        return max(self._last_inference_ms / 1000, self._awake_since_s)

    def wake(self) -> None:
        """Note that the version was loaded."""
        self._awake_since_s = time.time()

    def executed(self, execution: Execution, *, num_requests: int) -> None:
        """Count a run that answered requests."""
        self._num_executions += 1
        self._num_inferences += execution.rows
        size = execution.rows
        if size > _LARGEST_EXACT:
            size = 1 << (size - 1).bit_length()
        batch = self._batches.setdefault(size, BatchDurations())
        batch.compute_input.add(execution.input_s)
        batch.compute_infer.add(execution.infer_s)
        batch.compute_output.add(execution.output_s)
        self._requests.compute_infer.add(execution.infer_s * num_requests, num_requests)

    def answered(self, *, total_s: float, queue_s: float, input_s: float, output_s: float) -> None:
        """Count a request that was answered."""
        self._last_inference_ms = int(time.time() * 1000)
        self._requests.success.add(total_s)
        self._requests.queue.add(queue_s)
        self._requests.compute_input.add(input_s)
        self._requests.compute_output.add(output_s)

    def failed(self, total_s: float) -> None:
        """Count a request that ended with an error."""
        self._requests.fail.add(total_s)

    def snapshot(self) -> dict[str, Any]:
        """Give all counts in the extension's form, without the version's name."""
        return {
            "last_inference": self._last_inference_ms,
            "inference_count": self._num_inferences,
            "execution_count": self._num_executions,
            "inference_stats": asdict(self._requests),
            "batch_stats": [
                {"batch_size": size, **asdict(batch)}
                for size, batch in sorted(self._batches.items())
            ],
        }
