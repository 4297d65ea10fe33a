"""The memory that loaded models take, counted from their birth to their end.

A version that left the set of models still takes its memory until the last request that runs on
it has ended. So what is counted is the lives of objects, not the set.
"""

import ctypes
import gc
import threading
import weakref
from contextlib import suppress
from typing import Final

_USUAL_S: Final = 0.2  # longer than most requests take


def trim() -> None:
    """Give the system back what was freed; else glibc keeps what loading took for a moment."""
    with suppress(OSError, AttributeError):  # no glibc, no trimming
        ctypes.CDLL(None).malloc_trim(0)


class Memory:
    """How much models take, and may take. Safe to use from several threads.

    Args:
        max_bytes: how much they may take together; None means any amount.

    Attributes:
        max_bytes: as given.
        num_awakened: how often a model was loaded because a request asked for it.
        num_evicted: how often a model was dropped for another.
    """

    def __init__(self, max_bytes: int | None) -> None:
        self.max_bytes = max_bytes
        self.num_awakened = 0
        self.num_evicted = 0
        self._used = 0
        # Reentrant: an object may end wherever memory is allocated, in here too.
        self._freed = threading.Condition()

    def could_hold(self, num_bytes: int) -> bool:
        """Tell whether a model of this size fits when it is alone."""
        return self.max_bytes is None or num_bytes <= self.max_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Tell whether a model of this size fits now."""
        return self.max_bytes is None or self._used + num_bytes <= self.max_bytes

    def wait_for_room(self, num_bytes: int, timeout_s: float) -> bool:
        """Wait until a model of this size fits; False if it does not in time."""
        with self._freed:
            if self._freed.wait_for(lambda: self.has_room(num_bytes), min(_USUAL_S, timeout_s)):
                return True
        gc.collect()  # a failed request's traceback may hold its model in a cycle
        with self._freed:
            return self._freed.wait_for(lambda: self.has_room(num_bytes), timeout_s)

    def charge(self, model: object, num_bytes: int) -> None:
        """Count a model for as long as it lives."""
        with self._freed:
            self._used += num_bytes
        weakref.finalize(model, self._give_back, num_bytes).atexit = False

    def _give_back(self, num_bytes: int) -> None:
        with self._freed:
            self._used -= num_bytes
            self._freed.notify_all()
