"""How a fleet is told to spread out.

Pace steering, after Bonawitz et al., "Towards federated learning at scale: system design", MLSys
2019, section 2.3: devices draw the moment in which they come back from a window that grows with
their number, so that the rate at which they come does not.
"""

from minga.federation.limits import MAX_RECONNECT_WINDOW_S


def window_ms(num_devices: int, per_s: float) -> int:
    """Give the time, in milliseconds, in which so many devices should come back.

    Args:
        num_devices: how many are connected.
        per_s: how many may come in a second.
    """
    return round(1000 * min(num_devices / per_s, MAX_RECONNECT_WINDOW_S))
