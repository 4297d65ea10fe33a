"""What one inference server grants its callers."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what requests may cost.

    Attributes:
        max_body_bytes: the longest body, on the wire and after decompression.
        num_threads: how many requests too slow for the event loop compute at once.
    """

    max_body_bytes: int = 32 * 1024 * 1024
    num_threads: int = os.cpu_count() or 1
