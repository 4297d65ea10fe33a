"""How fast a model computes, and how many rows of it may compute together in time.

The number of rows follows additive increase and multiplicative decrease, as in Clipper
(Crankshaw et al., NSDI 2017): a full batch that is in time lets the next one have a row more, and
one that is late takes rows away. No window of time is waited for.
"""

from typing import Final

_NEWEST: Final = 0.2  # the weight of the newest batch in the mean
_LEAST_LEFT: Final = 0.5  # of the rows, after a batch that was late
_MOST_LEFT: Final = 0.9


class Pace:
    """The pace of one model.

    Args:
        row_s: a first guess of the time per row.
        max_rows: the most rows that may ever compute together.
        target_s: how long a batch may take; None means any time.

    Attributes:
        max_rows: the most rows that may compute together now.
    """

    def __init__(self, *, row_s: float, max_rows: int, target_s: float | None) -> None:
        self.max_rows = max_rows
        self._row_s = row_s
        self._ceiling = max_rows
        self._target_s = target_s

    def estimate_s(self, rows: int) -> float:
        """Guess how long rows take, computed as they come lately."""
        return rows * self._row_s

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a batch that was computed."""
        if rows == 0:
            return
        self._row_s += _NEWEST * (seconds / rows - self._row_s)
        if self._target_s is None:
            return
        if seconds > self._target_s and rows > 1:
            left = min(max(self._target_s / seconds, _LEAST_LEFT), _MOST_LEFT)
            self.max_rows = max(1, int(min(rows, self.max_rows) * left))
        elif rows >= self.max_rows:
            self.max_rows = min(self.max_rows + 1, self._ceiling)
