"""Find anomalies in a water circuit from eight sensors, without having been shown any."""

import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa

from minga.training import Split, Splits
from minga.training.anomalies import AnomalyTask
from minga.training.data import matrix, numbers, read_table

CALM_S = 400
"""Every experiment begins with so many seconds in order; models learn from them alone."""

SENSORS = (
    "acc1_rms",
    "acc2_rms",
    "current",
    "pressure",
    "temperature",
    "thermocouple",
    "voltage",
    "flow_rms",
)


class WaterCircuit(AnomalyTask):
    """Rank seconds by how unusual they are; an output above 0 is an alarm.

    Readings are taken relative to the calm seconds that an experiment began with, as somebody does
    who commissions a machine. Labels judge, and are never learned from.
    """

    name = "water-circuit"
    columns = SENSORS
    false_alarms = 0.05
    folds = "grouped"  # seconds of one experiment are alike

    def data(self, source: str) -> Splits:
        """Read experiments: of five, one chooses, one judges, three are learned from."""
        table = read_table(source) if Path(source).exists() else made_up()
        readings, labels = matrix(table, self.columns), numbers(table, "anomaly")
        named = (table.column(name).to_numpy().astype(str) for name in ("group", "experiment"))
        experiments = np.unique(np.char.add(*named), return_inverse=True)[1]
        part = np.random.default_rng(5).permutation(experiments.max() + 1)[experiments] % 5
        rows, is_calm = relative(readings, experiments)

        def split(chosen: np.ndarray) -> Split:
            return Split(
                inputs=rows[chosen],
                targets=labels[chosen].astype(np.float32),
                owners=experiments[chosen],
            )

        return Splits(
            train=split((part >= 2) & is_calm),
            validation=split(part == 0),
            test=split(part == 1),
        )


def relative(readings: np.ndarray, experiments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give readings relative to the calm seconds of their experiment, and which are these."""
    rows, is_calm = np.empty_like(readings), np.zeros(len(readings), bool)
    for experiment in np.unique(experiments):
        places = np.flatnonzero(experiments == experiment)
        is_calm[places[:CALM_S]] = True
        calm = readings[places[:CALM_S]]
        low, middle, high = np.quantile(calm, [0.1, 0.5, 0.9], axis=0)
        rows[places] = (readings[places] - middle) / np.maximum(high - low, 1e-3)
    return rows, is_calm


def made_up(num_experiments: int = 20, seconds: int = 800) -> pa.Table:
    """Make experiments of the same columns up, in whose last third a valve sticks."""
    warnings.warn("the real data is not there; made-up experiments take its place", stacklevel=2)
    generator = np.random.default_rng(0)
    parts = []
    for experiment in range(num_experiments):
        level = generator.normal(size=8)
        readings = level + generator.normal(size=(seconds, 8)) * 0.1
        anomaly = np.arange(seconds) > seconds * 2 / 3
        readings[anomaly] += generator.normal(size=8) * 0.4
        columns = dict(zip(SENSORS, readings.T, strict=True))
        parts.append(
            pa.table(
                {
                    "group": ["made-up"] * seconds,
                    "experiment": [str(experiment)] * seconds,
                    "anomaly": anomaly.astype(int),
                    **columns,
                }
            )
        )
    return pa.concat_tables(parts)
