"""How equally a classifier treats the groups that a Task names.

The figures are fairlearn's (`MetricFrame`; Bird et al., MSR-TR-2020-32): the rate at which each
group is selected, and the rates of right and wrong selections. Demographic parity compares the
first between groups, equalised odds the other two (Hardt et al., NeurIPS 2016).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.training.calibration import as_classes
from minga.training.document import Document


class Fairness(Document):
    """One attribute, such as sex, and how its groups fare.

    Differences are between the most and the least favoured group; groups of too few examples are
    in the table and not in them. A rate is None where the group has nothing to count.
    """

    attribute: str
    groups: dict[str, dict[str, float | None]]
    """Group -> number of examples, and rates of selection, true and false positives."""
    selection_gap: float
    """Demographic parity difference."""
    odds_gap: float
    """Equalised odds difference: the wider of the gaps of true and of false positives."""


def measure_fairness(
    attribute: str,
    groups: NDArray[Any],
    probabilities: NDArray[Any],
    targets: NDArray[Any],
    *,
    min_examples: int,
) -> Fairness:
    """Compare groups.

    Args:
        attribute: what the groups are of.
        groups: each example's group, shape `(n,)`.
        probabilities: shape `(n,)` of the positive class, or `(n, classes)`: the positive answer is
            any class but the first.
        targets: 0 or 1, or the class's index; shape `(n,)`.
        min_examples: smaller groups are in no difference.
    """
    from fairlearn.metrics import (
        MetricFrame,
        count,
        false_positive_rate,
        selection_rate,
        true_positive_rate,
    )

    answers = (as_classes(probabilities).argmax(axis=1) > 0).astype(int)
    truth = (np.asarray(targets).reshape(-1) > 0).astype(int)
    names = np.asarray(groups).astype(str)
    rates = {
        "selection_rate": selection_rate,
        "true_positive_rate": true_positive_rate,
        "false_positive_rate": false_positive_rate,
    }
    table = MetricFrame(
        metrics={"examples": count, **rates},
        y_true=truth,
        y_pred=answers,
        sensitive_features=names,
    ).by_group
    # fairlearn gives 0 for a rate of nothing; that would make a gap of what was not seen.
    has = {name: set(truth[names == name].tolist()) for name in table.index}
    found: dict[str, dict[str, float | None]] = {
        str(name): {
            "examples": float(row["examples"]),
            "selection_rate": float(row["selection_rate"]),
            "true_positive_rate": float(row["true_positive_rate"]) if 1 in has[name] else None,
            "false_positive_rate": float(row["false_positive_rate"]) if 0 in has[name] else None,
        }
        for name, row in table.iterrows()
    }
    judged = [one for one in found.values() if (one["examples"] or 0) >= min_examples]
    return Fairness(
        attribute=attribute,
        groups=found,
        selection_gap=_gap(judged, "selection_rate"),
        odds_gap=max(_gap(judged, name) for name in ("true_positive_rate", "false_positive_rate")),
    )


def _gap(groups: list[dict[str, float | None]], rate: str) -> float:
    values = [value for group in groups if (value := group[rate]) is not None]
    return max(values) - min(values) if values else 0.0
