"""Finds where a stream of errors changes: ADWIN, as river has it.

A. Bifet, R. Gavalda: Learning from Time-Changing Data with Adaptive Windowing, SDM 2007.
"""

from collections.abc import Sequence

from river.drift import ADWIN

from minga.inference.monitor.labels import CHANGE_LEVEL


def find_change(errors: Sequence[float]) -> int | None:
    """Give the place in the stream after which errors are others than before; None if they stay.

    Args:
        errors: in the order of their labels; 0 or 1, or how far numbers were off.
    """
    detector = ADWIN(delta=CHANGE_LEVEL)
    for place, error in enumerate(errors):
        detector.update(error)
        if detector.drift_detected:
            begin = place + 1 - int(detector.width)
            return begin if begin > 0 else None
    return None
