"""How often somebody may do something within a minute, and how often it was too often."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, Generic, TypeVar

from minga.federation.identity import Clock, utc_now

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
