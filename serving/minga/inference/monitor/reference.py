"""What a model was trained on, as far as its monitor needs it; it travels inside the ONNX file.

Under the key `minga.reference` in the model's metadata lies a JSON object that
`minga.training.reference` writes. So every process that can run a model can also watch it, and the
digest of the model's file vouches for its reference too. It holds quantiles, ranges, shares of
categories and error rates of the training and test data; never a row.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any, Final, Self

import numpy as np

from minga.inference.errors import ModelError
from minga.inference.monitor.indices import Floats
from minga.inference.monitor.losses import LossTree

METADATA_KEY: Final = "minga.reference"
LAYOUT: Final = 1
"""Version of the JSON object; a monitor leaves models with a newer one alone."""

MAX_COLUMNS: Final = 512
"""Wider tensors, and those that are no table, are one column, of which a row gives one value."""


class Role(StrEnum):
    """What a column describes."""

    INPUT = "input"
    OUTPUT = "output"
    ANSWER = "answer"
    """The class that was chosen, 0 and up."""
    SCORE = "score"
    """What the answer was chosen by, in bins for which the share of right answers is known."""


class AnswerKind(StrEnum):
    """What a model answers, and so how it is judged."""

    YES_NO = "yes-no"
    """One output; the score is that output, and a yes is a score from a threshold on."""
    CLASS = "class"
    """An output per class; the score is the lead of the largest over the second largest."""
    NUMBER = "number"
    """One output, which is a number to be near the target."""


@dataclass(frozen=True, eq=False)
class Column:
    """The distribution of one column in the reference, missing values aside.

    Attributes:
        role: which part of a request it is of.
        name: as people know it.
        edges: inner edges of its bins, rising.
        shares: share of the values in each bin, one more than there are edges.
        num_examples: how many values that comes from.
        mean: of the values.
        deviation: their standard deviation.
        missing: share of missing values.
        low: the smallest value.
        high: the largest value.
        categories: all values of a category, in order; empty for a number.
        names: what the categories are called where the model takes texts.
    """

    role: Role
    name: str
    edges: tuple[float, ...]
    shares: tuple[float, ...]
    num_examples: int
    mean: float = 0.0
    deviation: float = 0.0
    missing: float = 0.0
    low: float = -math.inf
    high: float = math.inf
    categories: tuple[float, ...] = ()
    names: tuple[str, ...] = ()

    @cached_property
    def edge_array(self) -> Floats:
        """The edges for numpy."""
        return np.asarray(self.edges, np.float64)

    @cached_property
    def share_array(self) -> Floats:
        """The shares for numpy."""
        return np.asarray(self.shares, np.float64)


@dataclass(frozen=True, slots=True)
class Outliers:
    """When a row is an outlier: the root mean square of its standardised numbers is this large.

    Attributes:
        threshold: in standard deviations.
        share: of the test split's rows that are above it.
    """

    threshold: float
    share: float


@dataclass(frozen=True, slots=True)
class Answers:
    """How the model's answers are judged.

    Attributes:
        kind: what it answers.
        rates: for each bin of the score the share of test examples that are a yes (`YES_NO`), or
            whose answer was right (`CLASS`); rising. Empty for a `NUMBER`.
        cut: the first bin of the score that is answered with a yes.
        error: mean absolute error on the test split, of a `NUMBER`.
        error_deviation: standard deviation of the absolute errors.
    """

    kind: AnswerKind
    rates: tuple[float, ...] = ()
    cut: int = 0
    error: float = 0.0
    error_deviation: float = 0.0


@dataclass(frozen=True, eq=False)
class Reference:
    """What a model's traffic is compared with.

    Attributes:
        digest: names it; of the JSON text, in hexadecimal.
        text: the JSON text itself.
        columns: of all roles, inputs first.
        num_held_out: the test split's rows.
        outliers: None if there are no numbers to standardise.
        answers: None if it is not known how answers are judged.
        losses: tells what errors to expect of a model that answers numbers, if anything does; its
            leaves are the bins of the column of role `SCORE`.
    """

    digest: str
    text: str
    columns: tuple[Column, ...]
    num_held_out: int
    outliers: Outliers | None
    answers: Answers | None
    losses: LossTree | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the JSON object.

        Raises:
            ModelError: it is none that a monitor can use.
        """
        try:
            given = json.loads(text)
            if given["layout"] != LAYOUT:
                raise ValueError(f"layout {given['layout']!r} is not {LAYOUT}")
            columns = tuple(_column(column) for column in given["columns"])
            if len({(column.role, column.name) for column in columns}) < len(columns):
                raise ValueError("two columns have one name")
            outliers, answers = given.get("outliers"), given.get("answers")
            reference = cls(
                digest=hashlib.sha256(text.encode()).hexdigest(),
                text=text,
                columns=columns,
                num_held_out=int(given["num_held_out"]),
                outliers=Outliers(**outliers) if outliers else None,
                answers=_answers(answers) if answers else None,
                losses=_losses(given["losses"], columns) if given.get("losses") else None,
            )
        except (
            KeyError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,  # an endless number
            RecursionError,  # lists in lists
        ) as error:
            raise ModelError(f"the model's reference cannot be read: {error}") from error
        score = reference.only(Role.SCORE)
        rates = reference.answers.rates if reference.answers else ()
        if rates and (score is None or len(score.shares) != len(rates)):
            raise ModelError("the model's reference cannot be read: rates do not fit the score")
        errors = reference.losses.errors if reference.losses else ()
        if errors and (score is None or len(score.shares) != len(errors)):
            raise ModelError("the model's reference cannot be read: losses do not fit the score")
        return reference

    @classmethod
    def of_metadata(cls, metadata: Mapping[str, str]) -> Self | None:
        """Read the reference from a model's metadata; None if it carries none of this layout."""
        text = metadata.get(METADATA_KEY)
        try:
            return None if text is None else cls.parse(text)
        except ModelError:
            return None

    def of_role(self, role: Role) -> tuple[Column, ...]:
        """Give the columns of a role, in order."""
        return tuple(column for column in self.columns if column.role is role)

    def only(self, role: Role) -> Column | None:
        """Give the one column of a role, if there is one."""
        return next(iter(self.of_role(role)), None)


def _losses(given: Mapping[str, Any], columns: tuple[Column, ...]) -> LossTree:
    num_inputs = sum(column.role is Role.INPUT for column in columns)
    return LossTree.of_json(dict(given), num_inputs + 1)


def _column(given: Mapping[str, Any]) -> Column:
    column = Column(
        **{
            **given,
            "role": Role(given["role"]),
            **{
                name: tuple(given.get(name, ()))
                for name in ("edges", "shares", "categories", "names")
            },
        }
    )
    edges = column.edge_array
    if len(column.shares) != len(edges) + 1 or np.any(np.diff(edges) <= 0):
        raise ValueError(f"the bins of column {column.name!r} are none")
    if column.num_examples < 1 or not np.isclose(column.share_array.sum(), 1, atol=1e-6):
        raise ValueError(f"the shares of column {column.name!r} do not add up to 1")
    return column


def _answers(given: Mapping[str, Any]) -> Answers:
    return Answers(
        **{**given, "kind": AnswerKind(given["kind"]), "rates": tuple(given.get("rates", ()))}
    )
