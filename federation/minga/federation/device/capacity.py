"""What a device's link carries, and whether it pays to pack what travels on it.

Each transfer gives a rate: bytes on the link over the time they took. That includes what both ends
do meanwhile, and a coordinator with many devices at once is slower for each, so the best of the
newest transfers counts as what the link carries. Chunks are packed from the next transfer on while
that is little; a link that turns out fast is left alone again.
"""

from collections import deque
from typing import Final, Literal, get_args

from minga.federation.device.metrics import Metrics
from minga.federation.limits import MIB
from minga.federation.transfer import Moved

WORTH_PACKING_BELOW: Final = 5e6
"""Bytes a second. There a MB takes 0.2 s and packing it 2 ms, for some 7 % of dense float32 weights
and more of sparse ones. A faster link would be worth it too, up to some 40 MB/s, if it were known
to be the link that is slow, and not the other end, which packs for all its devices."""

MEASURED_FROM_BYTES: Final = MIB // 16
"""A smaller transfer says more about its waiting than about the link."""

_NEWEST: Final = 4
"""So many transfers tell the rate."""

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
        self._rates: dict[Way, deque[float]] = {way: deque(maxlen=_NEWEST) for way in get_args(Way)}

    def packs(self, way: Way) -> bool:
        """Say whether the next transfer's chunks are to be packed."""
        if self._compress != "auto":
            return self._compress == "always"
        return 0 < max(self._rates[way], default=0) < WORTH_PACKING_BELOW

    def note(self, way: Way, moved: Moved) -> None:
        """Learn from a transfer that is done."""
        self._metrics.blob_content_bytes.labels(way).inc(moved.content_bytes)
        self._metrics.blob_wire_bytes.labels(way).inc(moved.wire_bytes)
        if moved.wire_bytes < MEASURED_FROM_BYTES or moved.seconds <= 0:
            return
        self._rates[way].append(moved.wire_bytes / moved.seconds)
        self._metrics.link_rate.labels(way).set(max(self._rates[way]))
