"""Two versions of a model that share its traffic, inside one process.

- A *canary* answers a share of the requests. Whatever it cannot answer, the baseline does, so
  a bad version fails nobody.
- A *shadow* answers nobody: it computes what the baseline has answered already, as far as
  there is time, and the two answers are compared.
- A *split* (A/B) is sticky: a caller's key, hashed, says which version it always gets; so what
  callers report of the answers can be counted for the version that gave them, in any process,
  without anything being remembered. A request without a key is the baseline's, and not counted.

What is counted here is judged elsewhere (`minga.serving.judging`).
"""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from minga.inference.tally import Tally

_HASHED: Final = 2**64


class Mode(StrEnum):
    """What the challenger does."""

    CANARY = "canary"
    SHADOW = "shadow"
    SPLIT = "split"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Which versions share a model's traffic, and how.

    Attributes:
        id: names the comparison and its stage; counts begin anew with another.
        model: the model.
        baseline: the version that the model's name stands for.
        challenger: the other version.
        mode: what the challenger does.
        share: the part of the requests that the challenger sees, from 0 to 1.
        salt: what is hashed with a caller's key: the same one keeps callers where they are.
        key: the header, or request parameter, in which callers send their key.
    """

    id: str
    model: str
    baseline: str
    challenger: str
    mode: Mode
    share: float
    salt: str
    key: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", Mode(self.mode))  # a config file knows texts alone

    def is_challengers(self, key: str) -> bool:
        """Tell whether the caller with this key gets the challenger, always the same way."""
        digest = hashlib.blake2b(f"{self.salt}\0{key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.share * _HASHED


class Arms:
    """A comparison under way in this process, and what it has counted; for one event loop.

    Args:
        comparison: which versions, and how.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.baseline = Tally()
        self.challenger = Tally()

    def choose(self, key: str | None) -> tuple[bool, bool]:
        """Choose a version for a request.

        Returns:
            Whether it is the challenger, and whether the request counts.
        """
        comparison = self.comparison
        if key is not None and comparison.mode is not Mode.SHADOW:
            return comparison.is_challengers(key), True
        if comparison.mode is Mode.SPLIT:
            return False, False
        return random.random() < comparison.share, True  # noqa: S311 - nothing hides in it

    def report_outcome(self, key: str, value: float) -> None:
        """Count what became of the answers that the caller with this key got."""
        is_challengers = self.comparison.is_challengers(key)
        (self.challenger if is_challengers else self.baseline).outcomes.add(value)

    def counts(self) -> dict[str, Tally]:
        """Give what was counted, by role."""
        return {"baseline": self.baseline, "challenger": self.challenger}


def key_of(parameters: Mapping[str, Any], header: str | None, name: str) -> str | None:
    """Find a caller's key: the request's own parameter, or else the header."""
    given = parameters.get(name, header)
    return None if given is None else str(given)
