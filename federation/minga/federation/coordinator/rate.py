"""How often somebody may do something.

`Rate` counts minutes and says afterwards what was too much: for what is written down. `Buckets` is
for what comes all the time: it costs a look into a dictionary.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Generic, TypeVar

from minga.federation.identity import Clock, utc_now
from minga.federation.limits import MAX_RATED, RATE_BURST_S

_MINUTE_S: Final = 60.0

Key = TypeVar("Key")


@dataclass(slots=True)
class _Minute:
    since: datetime
    num_allowed: int = 0
    num_refused: int = 0

    def is_over(self, now: datetime) -> bool:
        """True after a minute, and after the clock was set back."""
        return not 0 <= (now - self.since).total_seconds() < _MINUTE_S


@dataclass(slots=True, kw_only=True)
class Rate(Generic[Key]):
    """Counts by key.

    Attributes:
        per_minute: How often each key is allowed.
        clock: The time.
    """

    per_minute: int
    clock: Clock = utc_now
    _minutes: dict[Key, _Minute] = field(default_factory=dict)

    def allows(self, key: Key) -> bool:
        """Count a use of a key; False if its minute is full."""
        now = self.clock()
        minute = self._minutes.setdefault(key, _Minute(now))
        if minute.is_over(now):
            minute.since, minute.num_allowed = now, 0
        if minute.num_allowed < self.per_minute:
            minute.num_allowed += 1
            return True
        minute.num_refused += 1
        return False

    def sweep(self, *, everything: bool = False) -> list[tuple[Key, int]]:
        """Forget keys whose minute is over, or all; give those that were refused, and how often."""
        now = self.clock()
        ended = [key for key, m in self._minutes.items() if everything or m.is_over(now)]
        minutes = [(key, self._minutes.pop(key)) for key in ended]
        return [(key, minute.num_refused) for key, minute in minutes if minute.num_refused]


@dataclass(slots=True, kw_only=True)
class Buckets(Generic[Key]):
    """A token bucket for each key: so much a second, and a burst of it after a rest.

    Of a bucket only the time is kept at which it will be full again (the generic cell rate
    algorithm, ITU-T I.371, in its form with a virtual schedule).

    Attributes:
        per_s: How much each key may take a second, in the long run.
        burst_s: So many seconds' worth of it may be taken at once.
        clock: The time, in seconds; it is never set back.
    """

    per_s: float
    burst_s: float = RATE_BURST_S
    clock: Callable[[], float] = time.monotonic
    _full_at: dict[Key, float] = field(default_factory=dict)  # who was quiet longest comes first

    def allows(self, key: Key, amount: float = 1.0) -> bool:
        """Take some of a key's bucket; False, and nothing is taken, if that is not in it."""
        now = self.clock()
        before = max(now, self._full_at.pop(key, now))
        after = before + amount / self.per_s
        is_allowed = after - now <= self.burst_s
        self._full_at[key] = after if is_allowed else before
        if len(self._full_at) > MAX_RATED:
            del self._full_at[next(iter(self._full_at))]
        return is_allowed
