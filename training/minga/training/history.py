"""What training leaves behind of each epoch."""

import math
from collections.abc import Callable, Sequence

from minga.training.space import Objective

Record = dict[str, float]
"""What an epoch came to: `epoch`, counted from 1, `train_loss`, and the validation metrics."""

OnEpoch = Callable[[Record], None]
"""Is called with each epoch's record, from a thread that waits for it, and must return quickly."""


def unheard(record: Record) -> None:
    """Tell nobody of an epoch."""


def best_record(history: Sequence[Record], objective: Objective) -> Record:
    """Give the record of the best epoch; an empty one if no epoch has the metric.

    Of several the last: a metric that can get no better hides what else is learned meanwhile.
    """
    found = [record for record in history if math.isfinite(record.get(objective.metric, math.nan))]
    return max(
        reversed(found),
        key=lambda record: objective.gain(record[objective.metric], 0.0),
        default={},
    )


def is_stalled(
    history: Sequence[Record], objective: Objective, *, patience: int, min_gain: float = 0.0
) -> bool:
    """Tell whether the last `patience` epochs gained nothing; never, if `patience` is 0.

    Args:
        history: all epochs so far.
        objective: what counts as a gain.
        patience: so many epochs in a row may pass without one.
        min_gain: a value must be better than the best before by more than this.
    """
    if patience == 0:
        return False
    best, since = math.nan, 0
    for record in history:
        value = record.get(objective.metric, math.nan)
        # Over `nan`, which is best before there is a value, nothing compares.
        gained = math.isfinite(value) and not objective.gain(value, best) <= min_gain
        best, since = (value, 0) if gained else (best, since + 1)
    return since >= patience
