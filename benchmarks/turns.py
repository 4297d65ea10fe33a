"""Processes that train in turns, an epoch each, so that the machine's pace meets all alike.

A side names itself when its first epoch has ended, and waits; from then on it trains one epoch
whenever it is told to, and tells how long that took. When nobody tells it any more it goes on by
itself. Words go over a socket in the file system.
"""

import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final, TextIO

WAIT_S: Final = 300.0
"""A side that says nothing for so long has failed."""


class Side:
    """What a process does at the end of each of its epochs.

    Args:
        address: of the `Umpire`.
        name: which side it is.
    """

    def __init__(self, address: str, name: str) -> None:
        self._address = address
        self._name = name
        self._words: TextIO | None = None
        self._began_at = 0.0

    def epoch_ended(self) -> None:
        """Tell how long the epoch took, and wait until it is this side's turn again."""
        seconds = time.perf_counter() - self._began_at
        if self._words is None:
            link = socket.socket(socket.AF_UNIX)
            link.connect(self._address)
            self._words = link.makefile("rw", encoding="ascii")
            self._say(self._name)
        else:
            self._say(f"{seconds:.9f}")
        self._words.readline()  # empty once the umpire has gone
        self._began_at = time.perf_counter()

    def _say(self, word: str) -> None:
        assert self._words is not None
        try:
            self._words.write(f"{word}\n")
            self._words.flush()
        except BrokenPipeError:  # the umpire has gone
            return


class Umpire:
    """Lets sides train in turns.

    Args:
        folder: in which sides find it, by `address`.
    """

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "turns")
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(self.address)
        self._server.listen()
        self._server.settimeout(WAIT_S)
        self.ready_at: dict[str, float] = {}
        """When each side's first epoch had ended, by `time.time`."""
        self.ended_at: dict[str, float] = {}
        """Likewise its last one."""

    def play(self, names: Sequence[str], num_turns: int) -> list[dict[str, float]]:
        """Wait for all sides, and let each train one epoch in each turn.

        Returns:
            Seconds of each side's epoch, turn by turn.

        Raises:
            TimeoutError: a side has failed.
        """
        words: dict[str, TextIO] = {}
        with ExitStack() as stack:
            stack.callback(Path(self.address).unlink)
            stack.enter_context(self._server)
            while len(words) < len(names):
                link, _ = self._server.accept()
                link.settimeout(WAIT_S)
                side = stack.enter_context(link.makefile("rw", encoding="ascii"))
                link.close()  # the file keeps it open
                name = side.readline().strip()
                words[name], self.ready_at[name] = side, time.time()
            turns = []
            for number in range(num_turns):
                # Who follows whom changes: what one leaves in the cache meets the next one.
                order = names if number % 2 else [*reversed(names)]
                turns.append({name: self._turn(name, words[name]) for name in order})
        return turns

    def _turn(self, name: str, side: TextIO) -> float:
        side.write("train\n")
        side.flush()
        said = side.readline()
        if not said:
            raise TimeoutError(f"{name} has ended before its turns were over")
        self.ended_at[name] = time.time()
        return float(said)
