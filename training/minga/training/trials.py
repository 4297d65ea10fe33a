"""What a search leaves behind. Reading it loads no Ray, which wants its settings before that."""

from typing import Literal

from minga.training.document import Document
from minga.training.history import Record
from minga.training.space import Param

TrialStatus = Literal["finished", "cut", "diverged", "failed"]


class Trial(Document):
    """One point of the search space and what became of it.

    `cut` trials were stopped before `max_epochs` because others did better by then.
    """

    number: int
    params: dict[str, Param]
    metrics: dict[str, float]
    """Of its best epoch."""
    epochs: int
    status: TrialStatus
    history: tuple[Record, ...]


class SearchResult(Document):
    """The best parameters found, complete with the Task's defaults, and every trial."""

    params: dict[str, Param]
    metrics: dict[str, float]
    trials: tuple[Trial, ...]
    resumed: bool
    """Whether it went on from an interrupted search."""
