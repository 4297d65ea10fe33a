"""The calls that run at this moment, by who makes them.

Revoking somebody ends them too: a download or an upload of gigabytes was admitted once and runs for
minutes. And a device has only so many of them, over all its connections. Control streams are not
among them: the hub has those, and closes each behind what is queued.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

from minga.federation.coordinator.rate import Buckets
from minga.federation.errors import LimitError
from minga.federation.identity import Principal, Role
from minga.federation.limits import CALLS_PER_S, MAX_CALLS


@dataclass(slots=True, eq=False)
class Call:
    """One call that was admitted and is not over."""

    caller: str
    task: asyncio.Task[Any]
    is_ended: bool = False  # by `RunningCalls.end`


class RunningCalls:
    """All calls but control streams; lives in one event loop.

    Args:
        rate: How often a device may call.
    """

    def __init__(self, rate: Buckets[str] | None = None) -> None:
        self._calls: dict[str, set[Call]] = {}
        self._rate = rate or Buckets[str](per_s=CALLS_PER_S)

    def require_allowed(self, caller: Principal) -> None:
        """Make sure that a device does not call too often, or at once; operators may.

        Raises:
            LimitError: it does.
        """
        if caller.role is not Role.DEVICE:
            return
        if len(self._calls.get(caller.path, ())) >= MAX_CALLS:
            raise LimitError(f"{caller} has {MAX_CALLS} calls at once; wait for one of them")
        if not self._rate.allows(caller.path):
            raise LimitError(
                f"{caller} makes more calls than {self._rate.per_s:g} a second; wait a moment"
            )

    def begin(self, caller: Principal) -> Call:
        """Take note of a call that runs in the current task."""
        task = asyncio.current_task()
        assert task is not None
        call = Call(caller.path, task)
        self._calls.setdefault(call.caller, set()).add(call)
        return call

    def leave(self, call: Call) -> None:
        """Forget a call that is over."""
        calls = self._calls[call.caller]
        calls.discard(call)
        if not calls:
            del self._calls[call.caller]

    def end(self, caller: str) -> None:
        """Cancel the calls of somebody who was revoked, but for the one that asks for this.

        Args:
            caller: Whose, as `Principal.path` writes it.
        """
        for call in self._calls.get(caller, ()):
            if call.task is not asyncio.current_task():
                call.is_ended = True
                call.task.cancel()
