"""What a process does once all that it serves is loaded, so that it answers evenly from then on."""

import gc
import sys
from typing import Final

SWITCH_S: Final = 2e-5
"""How long one thread of Python keeps another from running, 5 ms by default.

A thread that has waited so long asks for its turn. Whoever calls the operating system lets go for a
moment, which wakes the one who waits and starts its waiting anew (`take_gil` in CPython's
`ceval_gil`). So an event loop that writes answers every 50 us would keep the thread that computes
from starting until all are written, unless that thread asks sooner.
"""


def settle() -> None:
    """Let what is loaded out of every later collection of garbage, and threads take short turns."""
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)
