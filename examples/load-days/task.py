"""Find the kinds of days that an electric utility's load has."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from minga.training import Splits
from minga.training.clusters import ClusterTask
from minga.training.data import read_table

UTILITY = "AEP"


class LoadDays(ClusterTask):
    """Tell days apart by the shape of their load, hour by hour, whatever their level."""

    name = "load-days"
    columns = tuple(f"hour_{hour}" for hour in range(24))

    def data(self, source: str) -> Splits:
        """Read hourly loads; each row is a day, relative to its own mean."""
        if Path(source).exists():
            frame = read_table(source, ("datetime_ept", UTILITY)).to_pandas()
            times, load = pd.to_datetime(frame["datetime_ept"]), frame[UTILITY].to_numpy(float)
        else:
            times, load = made_up()
        return self.divided(days(times, load), seed=7)


def days(times: pd.Series, load: np.ndarray) -> np.ndarray:
    """Make a row of each day of which all hours are known, shape `(days, 24)`."""
    hourly = pd.Series(load, index=pd.DatetimeIndex(times))
    hourly = hourly[~hourly.index.duplicated()]
    table = hourly.groupby([hourly.index.normalize(), hourly.index.hour]).mean().unstack()
    rows = table.dropna().to_numpy(np.float32)
    return rows / rows.mean(axis=1, keepdims=True)


def made_up(num_days: int = 600) -> tuple[pd.Series, np.ndarray]:
    """Make days of three kinds up: winter's with two peaks, summer's with one, and flat ones."""
    warnings.warn("the real data is not there; made-up days take its place", stacklevel=2)
    generator = np.random.default_rng(0)
    hours = np.arange(24)

    def peak(at: int, width: float) -> np.ndarray:
        return np.exp(-(((hours - at) / width) ** 2))

    shapes = np.stack([peak(8, 3) + peak(19, 3), 1.4 * peak(16, 5), 0.3 * peak(13, 8)])
    kinds = generator.integers(3, size=num_days)
    load = 10_000 * (1 + 0.3 * shapes[kinds] + generator.normal(0, 0.02, (num_days, 24)))
    times = pd.Series(pd.date_range("2011-01-01", periods=num_days * 24, freq="h"))
    return times, load.reshape(-1)
