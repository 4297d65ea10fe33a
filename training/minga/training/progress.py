"""How long work tells its caller how far it is."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One step of the path and how much of it is done.

    `total` is 0 while nobody knows it; a step is over when `done` equals a `total` above 0.
    """

    step: str
    done: int
    total: int
    note: str = ""


OnProgress = Callable[[Progress], None]
"""Is called from the thread that does the work, and must return quickly."""


def silent(progress: Progress) -> None:
    """Ignore all progress."""
