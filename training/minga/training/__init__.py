"""From a Task to a registered model: data checks, search, training, gates, export, registry.

Importing this package loads neither torch, Ray nor MLflow.
"""

from minga.training.space import (
    Maximize,
    Minimize,
    Params,
    choice,
    loguniform,
    randint,
    uniform,
)
from minga.training.task import Batch, Split, Splits, Task, TaskReference, load_task

__all__ = [
    "Batch",
    "Maximize",
    "Minimize",
    "Params",
    "Split",
    "Splits",
    "Task",
    "TaskReference",
    "choice",
    "load_task",
    "loguniform",
    "randint",
    "uniform",
]
