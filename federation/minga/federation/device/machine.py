"""What this machine is doing, as it is told to the coordinator."""

import psutil

from minga.federation.condition import Condition


def measure() -> Condition:
    """Look at power, processors and memory.

    The processors' time is that since the last call in this thread, or since this module was
    loaded.
    """
    return Condition(
        on_mains=_is_on_mains(),
        idle_cpu=1.0 - psutil.cpu_percent() / 100.0,
        free_memory_bytes=psutil.virtual_memory().available,
    )


def _is_on_mains() -> bool:
    """Say so also of machines without a battery, and where no battery can be asked."""
    ask = getattr(psutil, "sensors_battery", None)
    battery = ask() if ask is not None else None
    return battery is None or battery.power_plugged is not False
