"""Rules: how one mean update is made of several contributions, of which some may be lies.

With n contributions:

| rule | bears | needs | source |
|---|---|---|---|
| `Mean` | no liar | 1 | McMahan et al., AISTATS 2017 |
| `Median` | fewer than n/2 | 3 | Yin et al., ICML 2018, definition 1 |
| `TrimmedMean` | f = `liar_share` n | f >= 1 | Yin et al., ICML 2018, definition 2 |
| `Krum` | f = `liar_share` n | f >= 1, n >= 2f + 3 | Blanchard et al., NIPS 2017, section 4 |
| `MultiKrum` | f = `liar_share` n | f >= 1, n >= 2f + 3 | the same; Damaskinos et al., MLSys 2019 |
| `GeometricMedian` | fewer than n/2 | 3 | Pillutla et al., IEEE TSP 70, 2022 |

To bear f liars means: wherever f contributions lie, the result stays within a distance of the
others that does not depend on the lies. `Median` and `TrimmedMean` stay within the range of the
others in each coordinate. It does not mean that the result is right: liars who stay close to the
others still pull it by about as much as the others differ among themselves, and more so where the
honest ones have unlike data (Karimireddy et al., ICLR 2022).

All but `Mean` give every contribution one vote. A weight is what its sender says of itself, so a
rule that went by weights would sell votes to whoever claims the most examples.

Two kinds, by what they compute from. A `LinearRule` takes the contributions' inner products and
gives one coefficient for each: distances are |x - y|² = xx - 2xy + yy. A `CoordinateRule` takes all
values of one coordinate. `combination.combine` does the rest, in blocks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import ceil, floor, isfinite
from typing import ClassVar, Final

import numpy as np

from minga.federation.aggregation.contributions import Vector, Wide
from minga.federation.aggregation.geometric_median import geometric_median
from minga.federation.errors import RuleError

_SLACK: Final = 1e-9
"""A share of 0.29 of 100 is 29, though 0.29 * 100 is a little less in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """Shorten contributions that are longer than a bound to that bound, before any rule.

    A contribution's direction stays. Its pull is bounded, so liars cannot win by sending large
    values; they can still all point the same wrong way.

    Attributes:
        max_norm: the bound, above 0; None: the median of the contributions' own lengths, which
            fewer than half of them cannot choose.

    Raises:
        ValueError: the bound is out of its range.
    """

    max_norm: float | None = None

    def __post_init__(self) -> None:
        if self.max_norm is not None and not (self.max_norm > 0 and isfinite(self.max_norm)):
            raise ValueError(f"max_norm is {self.max_norm:g}; it must be above 0 and finite")

    def factors(self, norms: Wide) -> Wide:
        """Give by what each contribution is multiplied, at most 1.

        Args:
            norms: the contributions' lengths, shape `(n,)`.
        """
        bound = float(np.median(norms)) if self.max_norm is None else self.max_norm
        return np.divide(bound, norms, out=np.ones_like(norms), where=norms > bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule(ABC):
    """One way to make a mean update of contributions.

    Attributes:
        clip: what is done to each contribution before the rule; None: nothing.
    """

    clip: Clip | None = None

    @abstractmethod
    def num_liars(self, num_contributions: int) -> int:
        """Say how many of so many contributions may lie."""

    @abstractmethod
    def num_needed(self, num_contributions: int) -> int:
        """Say how many contributions it takes to bear `num_liars` of so many."""

    def require_enough(self, num_contributions: int) -> None:
        """Refuse so few contributions that the rule could not do what it promises.

        Raises:
            RuleError: how many are there, and how many are needed.
        """
        needed = self.num_needed(num_contributions)
        if num_contributions < needed:
            raise RuleError(
                f"{num_contributions} sound contributions are too few for {type(self).__name__}; "
                f"it needs {needed}: invite more devices, or choose another [federation.rule]"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearRule(Rule):
    """A rule whose result is a sum of contributions, each times its coefficient."""

    needs_products: ClassVar[bool] = True
    """Whether the products of different contributions are needed."""

    @abstractmethod
    def coefficients(self, products: Wide, weights: Wide) -> Wide:
        """Say how much of each contribution is in the result.

        Args:
            products: inner products of the contributions after clipping, shape `(n, n)`.
            weights: how much each counts by its own word, shape `(n,)`.

        Returns:
            Shape `(n,)`, from 0 on, with a sum of 1.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinateRule(Rule):
    """A rule that goes by the values of each coordinate alone."""

    @abstractmethod
    def reduce(self, rows: Vector) -> Wide:
        """Give one value for each coordinate.

        Args:
            rows: the contributions' values, shape `(n, coordinates)`, sorted along the first axis.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean(LinearRule):
    """The mean: best while nobody lies; one liar moves it anywhere.

    Attributes:
        is_weighted: whether contributions count by their weights; otherwise each counts once, as
            it must where one contribution's influence is to be bounded for privacy.
    """

    needs_products: ClassVar[bool] = False

    is_weighted: bool = True

    def num_liars(self, num_contributions: int) -> int:  # noqa: ARG002
        """Bear nobody."""
        return 0

    def num_needed(self, num_contributions: int) -> int:  # noqa: ARG002
        """Take whatever came."""
        return 1

    def coefficients(self, products: Wide, weights: Wide) -> Wide:  # noqa: ARG002
        """Go by weight, or by head."""
        return self.shares(weights)

    def shares(self, weights: Wide) -> Wide:
        """Give `coefficients`, which here need no products.

        Args:
            weights: how much each contribution counts by its own word, shape `(n,)`.
        """
        votes = weights if self.is_weighted else np.ones_like(weights)
        shares: Wide = votes / votes.sum()
        return shares


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricMedian(LinearRule):
    """The point with the smallest sum of distances to all contributions.

    It turns with the coordinates, so liars gain nothing by hiding in few of them. With f liars it
    is no further than 2 (n - f) / (n - 2f) times the longest honest distance from any point (Chen
    et al., POMACS 1(2), 2017, lemma 1). Pillutla et al. weigh by examples; here each has one vote.
    """

    def num_liars(self, num_contributions: int) -> int:
        """Bear fewer than half."""
        return (num_contributions - 1) // 2

    def num_needed(self, num_contributions: int) -> int:  # noqa: ARG002
        """Outvote one liar."""
        return 3

    def coefficients(self, products: Wide, weights: Wide) -> Wide:  # noqa: ARG002
        """Go by the distances."""
        return geometric_median(products)


@dataclass(frozen=True, slots=True, kw_only=True)
class Median(CoordinateRule):
    """The median of each coordinate; of an even number, the mean of the two in the middle."""

    def num_liars(self, num_contributions: int) -> int:
        """Bear fewer than half."""
        return (num_contributions - 1) // 2

    def num_needed(self, num_contributions: int) -> int:  # noqa: ARG002
        """Outvote one liar."""
        return 3

    def reduce(self, rows: Vector) -> Wide:
        """Take the middle."""
        low, high = (len(rows) - 1) // 2, len(rows) // 2
        middle: Wide = (rows[low].astype(np.float64) + rows[high]) / 2
        return middle


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sharing(Rule):
    """A rule that is told how many may lie.

    Attributes:
        liar_share: the share of contributions that may lie, 0.001 to below a half.
    """

    liar_share: float = 0.2

    def __post_init__(self) -> None:
        if not 0.001 <= self.liar_share < 0.5:
            raise ValueError(f"liar_share is {self.liar_share:g}; it must be between 0.001 and 0.5")

    def num_liars(self, num_contributions: int) -> int:
        """Give the share, rounded down."""
        return floor(self.liar_share * num_contributions + _SLACK)

    def num_needed(self, num_contributions: int) -> int:  # noqa: ARG002
        """Bear one liar at least: a rule that bears none, by rounding, is a trap."""
        return ceil(1 / self.liar_share - _SLACK)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrimmedMean(_Sharing, CoordinateRule):
    """The mean of each coordinate without its f smallest and its f largest values."""

    def reduce(self, rows: Vector) -> Wide:
        """Leave both ends out."""
        cut = self.num_liars(len(rows))
        mean: Wide = rows[cut : len(rows) - cut].mean(axis=0, dtype=np.float64)
        return mean


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiKrum(_Sharing, LinearRule):
    """The mean of the n - f - 2 contributions that have the nearest others nearest.

    A contribution's score is the sum of squared distances to its n - f - 2 nearest others. That
    many may be kept for the same promise as with one (Damaskinos et al., section 3.1).
    """

    def num_needed(self, num_contributions: int) -> int:
        """Have n >= 2f + 3 (Blanchard et al., proposition 4.2)."""
        needed = _Sharing.num_needed(self, num_contributions)
        return max(needed, 2 * self.num_liars(num_contributions) + 3)

    def num_kept(self, num_contributions: int) -> int:
        """Say how many contributions are averaged."""
        return num_contributions - self.num_liars(num_contributions) - 2

    def coefficients(self, products: Wide, weights: Wide) -> Wide:  # noqa: ARG002
        """Keep the best; of equal ones those that come first."""
        num = len(products)
        kept = np.argsort(self._scores(products), kind="stable")[: self.num_kept(num)]
        result = np.zeros(num)
        result[kept] = 1.0 / len(kept)
        return result

    def _scores(self, products: Wide) -> Wide:
        num = len(products)
        squares = np.diagonal(products)
        distances = np.maximum(squares[:, None] + squares - 2.0 * products, 0.0)
        np.fill_diagonal(distances, -1.0)  # itself comes first, whoever is equal to it
        nearest = np.sort(distances, axis=1)[:, 1 : num - self.num_liars(num) - 1]
        scores: Wide = nearest.sum(axis=1)
        return scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Krum(MultiKrum):
    """The one contribution that has its n - f - 2 nearest others nearest."""

    def num_kept(self, num_contributions: int) -> int:  # noqa: ARG002
        """Keep one."""
        return 1
