"""What both sides of `rounds.py` do: shared with the rival's process."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One size of round."""

    num_devices: int
    num_values: int

    @property
    def model_bytes(self) -> int:
        """One model as float32."""
        return 4 * self.num_values

    def __str__(self) -> str:
        """Give `8 x 1 MB`."""
        return f"{self.num_devices} x {self.model_bytes / 1e6:g} MB"


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """What some rounds took; the first one is apart: processes and caches are cold."""

    first_s: float
    rounds_s: tuple[float, ...]
    """Each later round: from the order that sends devices to work until the next model is there."""
    period_s: float
    """From one order to the next, on average: with whatever is done between rounds."""
    idle_bytes: int
    """The server's processes before the run."""
    peak_bytes: int
    """The same at the highest."""
    max_error: float
    """The largest distance of a coordinate from what the rounds should have come to."""


def step_of(device: int) -> float:
    """Say how far a device moves each coordinate in a round: no two devices send the same bytes."""
    return 0.001 * (device + 1)


def expected(case: Case, num_rounds: int) -> float:
    """Say where each coordinate, which begins at 0, is after some rounds."""
    steps = [step_of(device) for device in range(case.num_devices)]
    return num_rounds * sum(steps) / len(steps)


def status_bytes(pid: int | str, name: str) -> int:
    """Read how much memory a process has or had: `VmRSS` or `VmHWM` of proc_pid_status(5)."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"the kernel does not tell {name}")
