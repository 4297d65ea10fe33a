"""Ctrl-C around libraries that take its handler and do not give it back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def handler_restored() -> Iterator[None]:
    """Restore the handler of SIGINT after the block.

    Ray Tune and Ray Train install handlers of their own and leave them in place, where they
    swallow the Ctrl-C that is meant for later work.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
