"""What one inference server grants its callers."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what requests may cost.

    Attributes:
        max_body_bytes: the longest body, on the wire and after decompression.
        max_pending_bytes: bodies of requests and answers that are in memory at once; what would
            pass it is refused.
        body_timeout_s: how long a body may take to arrive, and an answer to be taken.
        num_threads: how many requests, or batches of them, too slow for the event loop compute
            at once.
        max_batch_rows: the rows of requests that compute together; 1 lets each compute alone.
        objective_s: how long a request that is too slow for the event loop may take; what would
            be late is refused. None means any time.
        model_control: whether callers may load and unload models.
    """

    max_body_bytes: int = 32 * 1024 * 1024
    max_pending_bytes: int = 256 * 1024 * 1024
    body_timeout_s: float = 60.0
    num_threads: int = os.cpu_count() or 1
    max_batch_rows: int = 128
    objective_s: float | None = None
    model_control: bool = False
