"""Files that one process at a time may hold.

One command at a time works in a project, since two would train in the same folders; one responder
at a time decides what its alarms lead to.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from minga.cluster.errors import BusyError
from minga.cluster.project import Project

FILE = "working"

_held: set[Path] = set()


@contextmanager
def occupied(project: Project) -> Iterator[None]:
    """Keep the project's unfinished work to this process for as long as the block lasts.

    Blocks may be nested. The lock ends with the process, however that ends.

    Raises:
        BusyError: another process works there.
    """
    path = project.ray_storage / FILE
    if path in _held:
        yield
        return

    def problem(holder: str) -> str:
        where = project.directory
        return f"process {holder} searches, trains or simulates in {where}; wait for it, or end it"

    with held(path, problem):
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


@contextmanager
def held(path: Path, problem: Callable[[str], str]) -> Iterator[None]:
    """Hold a file for this process; the hold ends with it, however that ends.

    Args:
        path: the file; made if missing.
        problem: says who holds it, given that process.

    Raises:
        BusyError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(problem(file.read().strip() or "of another machine")) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
