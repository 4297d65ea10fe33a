"""Forecast tomorrow's load of an electric utility, hour by hour."""

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from minga.training import Minimize, Params, Splits, Task, choice, loguniform
from minga.training.data import in_order, read_table

UTILITY = "AEP"
LAGS_H = (*range(24, 48), 168)
"""What is known when tomorrow is forecast: the same hour a day ago and before, and a week ago."""

CYCLES = ("hour", "weekday", "season")


class EnergyForecast(Task):
    """Predict by which share the load differs from that of the same hour a day before."""

    name = "energy-forecast"
    columns = (
        *(f"load_{lag}h_ago" for lag in LAGS_H),
        *(f"{cycle}_{part}" for cycle in CYCLES for part in ("sin", "cos")),
        "is_weekend",
        "was_weekend",
    )
    defaults = {"lr": 3e-3, "hidden": 64, "batch_size": 256}
    search_space = {"lr": loguniform(1e-3, 1e-2), "hidden": choice([32, 64, 128])}
    objective = Minimize("mape")

    def data(self, source: str) -> Splits:
        """Read hourly loads; the last fifth of the years judges, the fifth before chooses."""
        if Path(source).exists():
            frame = read_table(source, ("datetime_ept", UTILITY)).to_pandas()
            times, load = pd.to_datetime(frame["datetime_ept"]), frame[UTILITY].to_numpy(float)
        else:
            times, load = made_up()
        return in_order(*examples(times, load))

    def model(self, params: Params) -> nn.Module:
        """Build a network with two hidden layers."""
        hidden = int(params["hidden"])
        return nn.Sequential(
            nn.Linear(len(self.columns), hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
            nn.Flatten(start_dim=0),
        )

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Give the mean absolute error relative to the load itself."""
        return ((outputs - targets).abs() / (1 + targets)).mean()

    def metrics(self, outputs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
        """Give the mean absolute percentage error, and how much of the naive forecast's is left.

        The naive forecast takes yesterday's load of the same hour.
        """
        mape = float(np.mean(np.abs(outputs - targets) / (1 + targets)) * 100)
        naive = float(np.mean(np.abs(targets) / (1 + targets)) * 100)
        return {"mape": mape, "share_of_naive": mape / naive}


def examples(times: pd.Series, load: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make an example of each hour whose past is known, on a whole line of hours."""
    hourly = pd.Series(load, index=pd.DatetimeIndex(times))
    hourly = hourly[~hourly.index.duplicated()].asfreq("h").interpolate(limit=3)
    index = hourly.index
    columns = [hourly.shift(lag).to_numpy() for lag in LAGS_H]
    angles = (index.hour / 24, index.day_of_week / 7, index.day_of_year / 365.25)
    for angle in angles:
        columns += [np.sin(2 * np.pi * angle), np.cos(2 * np.pi * angle)]
    columns += [index.day_of_week >= 5, (index.day_of_week + 6) % 7 >= 5]
    inputs = np.column_stack([np.asarray(column, np.float32) for column in columns])
    targets = (hourly / hourly.shift(24) - 1).to_numpy(np.float32)
    is_known = np.isfinite(inputs).all(axis=1) & np.isfinite(targets)
    return inputs[is_known], targets[is_known]


def made_up(num_days: int = 3 * 365) -> tuple[pd.Series, np.ndarray]:
    """Make three years of loads up: days, weeks, seasons, and weather that lasts for days."""
    warnings.warn("the real data is not there; made-up years take its place", stacklevel=2)
    generator = np.random.default_rng(0)
    times = pd.Series(pd.date_range("2011-01-01", periods=num_days * 24, freq="h"))
    hours = np.arange(len(times))
    weather = np.zeros(num_days)
    for day in range(1, num_days):
        weather[day] = 0.8 * weather[day - 1] + generator.normal(0, 0.02)
    daily = -0.15 * np.cos(2 * np.pi * (times.dt.hour - 4) / 24)
    weekly = np.where(times.dt.day_of_week >= 5, -0.12, 0.0)
    yearly = 0.1 * np.cos(4 * np.pi * hours / (365 * 24))
    noise = generator.normal(0, 0.01, len(times))
    level = 1 + daily + weekly + yearly + np.repeat(weather, 24) + noise
    return times, 15_000 * level.to_numpy()
