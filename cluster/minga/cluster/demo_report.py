"""What the demo measured, as `minga demo --report FILE` writes it."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class KilledDevice:
    """The device that was killed in the middle of a round, and how that round ended."""

    device: str
    round_number: int
    survivors: tuple[str, ...]
    total_weight: int
    """Sum of the example counts in the round's sum, from the unmasked vector."""
    expected_weight: int
    """The survivors' example counts, added up from their files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficReport:
    """What the client saw that asked throughout."""

    num_requests: int
    num_failures: int
    versions: tuple[str, ...]
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAnswer:
    """One device's own answer with the promoted version."""

    device: str
    version: str
    sha256: str
    max_difference: float
    """From the central server's answer to the same rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """The demo's results.

    `metrics` has, for `site alone (mean)`, `central only` and `federated`, the metrics on the
    central test set that nobody trained on.
    """

    metrics: Mapping[str, Mapping[str, float]]
    sites_alone: Mapping[str, Mapping[str, float]]
    promoted: bool
    champion_version: str
    num_rounds: int
    cohort: int
    bytes_per_device_per_round: float
    coordinator_peak_memory_bytes: int
    killed: KilledDevice
    traffic: TrafficReport
    devices: tuple[DeviceAnswer, ...]
    times_s: Mapping[str, float]
    folder: str

    def as_json(self) -> dict[str, Any]:
        """Give the report as plain values."""
        return asdict(self)

    def rows(self) -> Iterator[tuple[str, str]]:
        """Give the closing table's lines below the metrics: what, how much."""
        killed = self.killed
        yield "federated version", "promoted, served, on devices" if self.promoted else "refused"
        yield "rounds committed", f"{self.num_rounds} with up to {self.cohort} devices"
        yield (
            f"round {killed.round_number} without {killed.device}",
            f"sum of {len(killed.survivors)} devices, {killed.total_weight} examples: exact",
        )
        yield "bytes per device and round", f"{self.bytes_per_device_per_round:,.0f}"
        yield "coordinator's peak memory", f"{self.coordinator_peak_memory_bytes / 2**20:.0f} MB"
        yield (
            "requests throughout",
            f"{self.traffic.num_requests}, failed {self.traffic.num_failures}, "
            f"median {self.traffic.p50_ms:.1f} ms, 99th percentile {self.traffic.p99_ms:.1f} ms",
        )
        yield "devices on the new version", str(len(self.devices))
        yield "time", ", ".join(f"{name} {time:.0f} s" for name, time in self.times_s.items())
        yield "total time", f"{sum(self.times_s.values()):.0f} s"
