"""What both sides of `secagg.py` do, and how it is measured: shared with the rival's process."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_WEIGHT = 1000
"""Flower's default; a device's weight is drawn from 1 up to it."""

UPDATE_SPREAD = 0.02
"""Standard deviation of an update's coordinates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One round's size."""

    num_values: int
    num_devices: int
    num_lost: int
    """Devices that vanish after they shared their secrets, before they upload."""
    num_neighbours: int
    """Devices that each one masks with."""
    threshold: int
    """Shares that rebuild a secret."""

    @property
    def num_survivors(self) -> int:
        """Devices whose updates are in the sum: the first ones."""
        return self.num_devices - self.num_lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One round's figures."""

    device_s: float
    """One device's keys, shares and masked update; the median of the survivors."""
    finish_s: float
    """The same device's part in unmasking."""
    sum_s: float
    """The server's addition of all masked updates."""
    unmask_s: float
    """From the shares that arrived to the mean update."""
    upload_bytes: int
    """One masked update."""
    server_peak_bytes: int
    """What the server's process grew by, from the first masked update to the mean."""
    max_error: float
    """The largest distance of a coordinate from the exact weighted mean."""


def draw_update(case: Case, device: int) -> NDArray[np.float32]:
    """Draw a device's update, float32 of shape `(num_values,)`; each time the same one."""
    drawn = np.random.default_rng(device).standard_normal(case.num_values, np.float32)
    return drawn * np.float32(UPDATE_SPREAD)


def weight_of(device: int) -> int:
    """Say how much a device's update counts."""
    return 1 + 379 * (device + 1) % MAX_WEIGHT


def exact_mean(case: Case) -> NDArray[np.float64]:
    """Give the survivors' weighted mean, which the sum under masks should come to."""
    total = np.zeros(case.num_values)
    for device in survivors(case):
        total += draw_update(case, device) * np.float64(weight_of(device))
    return total / sum(weight_of(device) for device in survivors(case))


def survivors(case: Case) -> Iterator[int]:
    """Give the devices that upload. The lost ones lie evenly among the others."""
    lost = {place * case.num_devices // case.num_lost for place in range(case.num_lost)}
    return (device for device in range(case.num_devices) if device not in lost)
