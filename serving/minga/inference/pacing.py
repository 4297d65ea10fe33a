"""How fast a model computes, and how many rows of it may compute together in time.

The number of rows follows additive increase and multiplicative decrease, as in Clipper
(Crankshaw et al., NSDI 2017): a full batch that is in time lets the next one have a row more, and
one that is late takes rows away. No window of time is waited for.
"""

import math
from typing import Final

_NEWEST: Final = 0.2  # the weight of the newest batch in the mean
_LEAST_LEFT: Final = 0.5  # of the rows, after a batch that was late
_MOST_LEFT: Final = 0.9
_LONG_S: Final = 2e-3  # a shorter batch has ended before anybody could ask again


class Pace:
    """The pace of one model.

    Args:
        row_s: a first guess of the time per row.
        max_rows: the most rows that may ever compute together.
        target_s: how long a batch may take; None means any time.

    Attributes:
        max_rows: the most rows that may compute together now.
        waiting_rows: rows that wait; kept up to date by the owner.
    """

    def __init__(self, *, row_s: float, max_rows: int, target_s: float | None) -> None:
        self.max_rows = max_rows
        self.waiting_rows = 0
        self._row_s = row_s
        self._ceiling = max_rows
        self._target_s = target_s
        self._last_rows = 0
        self._last_s = 0.0
        self._least_s = math.inf
        self._answer_row_s = 0.0

    def estimate_s(self, rows: int) -> float:
        """Guess how long rows take, computed as they come lately."""
        return rows * self._row_s

    def note(self, rows: int, seconds: float) -> None:
        """Learn from a batch that was computed."""
        if rows == 0:
            return
        self._last_rows, self._last_s = rows, seconds
        self._least_s = min(self._least_s, seconds)
        self._row_s += _NEWEST * (seconds / rows - self._row_s)
        if self._target_s is None:
            return
        if seconds > self._target_s and rows > 1:
            left = min(max(self._target_s / seconds, _LEAST_LEFT), _MOST_LEFT)
            self.max_rows = max(1, int(min(rows, self.max_rows) * left))
        elif rows >= self.max_rows:
            self.max_rows = min(self.max_rows + 1, self._ceiling)

    def note_answers(self, rows: int, seconds: float) -> None:
        """Learn how long answers with so many rows kept the event loop."""
        self._answer_row_s += _NEWEST * (seconds / max(rows, 1) - self._answer_row_s)

    @property
    def overlaps(self) -> bool:
        """Whether half of the rows should be computed while the others' callers are answered.

        Two halves take longer than the whole: by what a run takes however few its rows are, for
        which the shortest stands. What they gain is the time in which callers are answered and ask
        again, about twice that of the answers alone.
        """
        around_s = 2 * self._here * self._answer_row_s
        return self._last_s >= _LONG_S and around_s > self._least_s

    def next_rows(self) -> int:
        """Say how many rows the next batch may have."""
        return min(self.max_rows, -(-self._here // 2)) if self.overlaps else self.max_rows

    @property
    def _here(self) -> int:
        """Rows that wait, and those whose callers were answered last and may ask again."""
        return self.waiting_rows + self._last_rows
