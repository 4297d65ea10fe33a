"""What a device's link carries, and whether it pays to pack what travels on it.

Each transfer measures the link (bytes on it over the time they took), and newer ones count more. A
link that is slow enough gets its chunks packed from the next transfer on; a link that has become
fast again is left alone. The measure includes what both ends do meanwhile, so it says what can be
had, not what the wire could do.
"""

from typing import Final, Literal

from minga.federation.device.metrics import Metrics
from minga.federation.limits import MIB
from minga.federation.transfer import Moved

WORTH_PACKING_BELOW: Final = 20e6
"""Bytes a second. A core packs some 500 MB of dense float32 weights a second and makes them 7 %
smaller: below some 40 MB/s that is time won. Half of it, since the coordinator packs for many."""

MEASURED_FROM_BYTES: Final = MIB // 16
"""A smaller transfer says more about its waiting than about the link."""

_NEWEST: Final = 0.5
"""How much the newest transfer counts in the rate."""

Compress = Literal["auto", "always", "never"]
"""When chunks travel as Zstandard frames; `auto`: while the link is slow."""

Way = Literal["down", "up"]
"""To the device, or from it."""


class Capacity:
    """What one device's link carries each way.

    Args:
        compress: When chunks are packed.
        metrics: Where what was moved and measured is told.
    """

    def __init__(self, compress: Compress, metrics: Metrics) -> None:
        self._compress = compress
        self._metrics = metrics
        self._rates: dict[str, float] = {}

    def packs(self, way: Way) -> bool:
        """Say whether the next transfer's chunks are to be packed."""
        if self._compress != "auto":
            return self._compress == "always"
        rate = self._rates.get(way)
        return rate is not None and rate < WORTH_PACKING_BELOW

    def note(self, way: Way, moved: Moved) -> None:
        """Learn from a transfer that is done."""
        self._metrics.blob_content_bytes.labels(way).inc(moved.content_bytes)
        self._metrics.blob_wire_bytes.labels(way).inc(moved.wire_bytes)
        if moved.wire_bytes < MEASURED_FROM_BYTES or moved.seconds <= 0:
            return
        rate = moved.wire_bytes / moved.seconds
        before = self._rates.get(way, rate)
        self._rates[way] = before + _NEWEST * (rate - before)
        self._metrics.link_rate.labels(way).set(self._rates[way])
