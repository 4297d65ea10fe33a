"""Ctrl-C and SIGTERM around libraries that take their handlers and do not give them back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Restore the handlers of SIGINT and SIGTERM after the block.

    Ray, Ray Tune and Ray Train install handlers of their own and leave them in place, where they
    swallow what is meant for later work.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
