"""What training leaves behind of each epoch."""

import math
from collections.abc import Sequence

from minga.training.space import Objective

Record = dict[str, float]
"""What an epoch came to: `epoch`, counted from 1, `train_loss`, and the validation metrics."""


def best_record(history: Sequence[Record], objective: Objective) -> Record:
    """Give the record of the best epoch; an empty one if no epoch has the metric."""
    found = [record for record in history if math.isfinite(record.get(objective.metric, math.nan))]
    return max(found, key=lambda record: objective.gain(record[objective.metric], 0.0), default={})
