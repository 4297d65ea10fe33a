"""The calls that run at this moment, by who makes them: so that revoking somebody ends them too.

A download or an upload of gigabytes was admitted once and runs for minutes. Control streams are not
among them: the hub has those, and closes each behind what is queued.
"""

import asyncio
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Call:
    """One call that was admitted and is not over."""

    caller: str
    task: asyncio.Task[Any]
    is_ended: bool = False  # by `RunningCalls.end`


class RunningCalls:
    """All calls but control streams; lives in one event loop."""

    def __init__(self) -> None:
        self._calls: dict[str, set[Call]] = {}

    def begin(self, caller: str) -> Call:
        """Take note of a call that runs in the current task.

        Args:
            caller: Whose it is, as `Principal.path` writes it.
        """
        task = asyncio.current_task()
        assert task is not None
        call = Call(caller, task)
        self._calls.setdefault(caller, set()).add(call)
        return call

    def leave(self, call: Call) -> None:
        """Forget a call that is over."""
        calls = self._calls[call.caller]
        calls.discard(call)
        if not calls:
            del self._calls[call.caller]

    def end(self, caller: str) -> None:
        """Cancel the calls of somebody who was revoked, but for the one that asks for this."""
        for call in self._calls.get(caller, ()):
            if call.task is not asyncio.current_task():
                call.is_ended = True
                call.task.cancel()
