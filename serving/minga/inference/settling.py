"""What a process does once all that it serves is loaded, so that it answers evenly from then on."""

import gc
import sys
from typing import Final

SWITCH_S: Final = 5e-4
"""How long a thread may keep the event loop from running: a tenth of Python's default, which the
monitor's thread would take each time that the loop reads or writes, for some ms of every second."""


def settle() -> None:
    """Let what is loaded out of every later collection of garbage, and threads take short turns."""
    gc.freeze()
    sys.setswitchinterval(SWITCH_S)
