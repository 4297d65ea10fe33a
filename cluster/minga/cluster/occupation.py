"""One command at a time works in a project: two would train in the same folders."""

import fcntl
import os
from collections.abc import Iterator
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
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BusyError(
                f"process {file.read().strip() or 'of another machine'} searches or trains in "
                f"{project.directory}; wait for it, or end it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
            file.truncate(0)
