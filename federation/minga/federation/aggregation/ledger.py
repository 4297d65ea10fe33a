"""What privacy was spent, and whether there is any left.

Every round that publishes something about its devices writes down what it spent. A round is
refused that would bring the total past the budget: epsilon, at the budget's delta.

All devices are charged for every round, also those that were not in it, and the draw of a cohort
buys nothing. Both are on the safe side. The theorems that make a small random cohort cheaper
("amplification by sampling") need each device to be drawn by chance and nobody to know who was; a
coordinator takes devices that are connected and eligible, and they and it know who was in.

Mechanisms of later rounds may be chosen by the results of earlier ones, as long as the total is
held against a budget that was fixed before: for Gaussian and for concentrated privacy such a filter
costs nothing (Feldman and Zrnic, NeurIPS 2021; Smith and Thakurta, 2022).

The figures come from the package dp-accounting, which is loaded when they are asked for: a device
has no need of it.
"""

import json
from dataclasses import dataclass, replace
from importlib import import_module
from math import isfinite, sqrt
from types import ModuleType
from typing import Self

from minga.federation.errors import BudgetError, PrivacyError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaussian:
    """Gaussian noise on a sum, once.

    Attributes:
        noise_multiplier: its standard deviation over the longest update, above 0.
    """

    noise_multiplier: float

    def __post_init__(self) -> None:
        _require_positive("noise_multiplier", self.noise_multiplier)


@dataclass(frozen=True, slots=True, kw_only=True)
class Concentrated:
    """Anything that is rho-concentrated differentially private (Bun and Steinke, TCC 2016), once.

    Attributes:
        rho: above 0.
    """

    rho: float

    def __post_init__(self) -> None:
        _require_positive("rho", self.rho)


Mechanism = Gaussian | Concentrated


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The most that may be spent.

    Attributes:
        epsilon: how much more likely any result may become by one device's update, as a
            logarithm; above 0.
        delta: except with this probability; between 0 and 1, and well below one over the number
            of devices.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        _require_positive("epsilon", self.epsilon)
        if not 0 < self.delta < 1:
            raise PrivacyError(f"delta is {self.delta:g}; it must be between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """One mechanism, so many times in a row."""

    mechanism: Mechanism
    times: int = 1

    def __post_init__(self) -> None:
        if type(self.times) is not int or self.times < 1:
            raise PrivacyError(f"a mechanism was used {self.times} times; that is no spending")


@dataclass(frozen=True, slots=True)
class Ledger:
    """All that was spent so far, the oldest first."""

    entries: tuple[Spent, ...] = ()

    def epsilon(self, delta: float) -> float:
        """Say what was spent, as epsilon at some delta; 0 if nothing was.

        Exact where all of it is Gaussian noise (Balle and Wang, ICML 2018); otherwise an upper
        bound by Rényi divergences.

        Raises:
            PrivacyError: dp-accounting is not installed.
        """
        if not self.entries:
            return 0.0
        accounting = _accounting()
        rho = sum(_rho(entry.mechanism) * entry.times for entry in self.entries)
        if all(isinstance(entry.mechanism, Gaussian) for entry in self.entries):
            # All of them together are one Gaussian sum, which has this rho.
            return float(accounting.get_epsilon_gaussian(1.0 / sqrt(2.0 * rho), delta))
        accountant = accounting.rdp.RdpAccountant()
        accountant.compose(accounting.ZCDpEvent(rho))  # rho adds up
        return float(accountant.get_epsilon(delta))

    def spend(self, mechanism: Mechanism, budget: Budget, times: int = 1) -> Self:
        """Give the ledger after one more mechanism, or the same one several times.

        Raises:
            BudgetError: that would be more than the budget; nothing is spent.
            PrivacyError: dp-accounting is not installed.
        """
        spent = self._with(Spent(mechanism=mechanism, times=times))
        epsilon = spent.epsilon(budget.delta)
        if not epsilon <= budget.epsilon:
            raise BudgetError(
                f"{times} more round{'s' * (times > 1)} would bring what was spent to epsilon "
                f"{epsilon:.4g} at delta {budget.delta:g}; the budget is {budget.epsilon:g}"
            )
        return spent

    def _with(self, more: Spent) -> Self:
        if self.entries and self.entries[-1].mechanism == more.mechanism:
            last = replace(more, times=self.entries[-1].times + more.times)
            return replace(self, entries=(*self.entries[:-1], last))
        return replace(self, entries=(*self.entries, more))

    def to_json(self) -> str:
        """Write the ledger down; floats are kept exactly."""
        return json.dumps([_to_pair(entry) for entry in self.entries])

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a ledger back.

        Raises:
            PrivacyError: that is no ledger.
        """
        try:
            return cls(tuple(_from_pair(*pair) for pair in json.loads(text)))
        except (TypeError, ValueError, KeyError) as error:
            raise PrivacyError(f"the privacy ledger cannot be read: {error}") from error


def _to_pair(entry: Spent) -> list[str | float | int]:
    match entry.mechanism:
        case Gaussian(noise_multiplier=number):
            return ["gaussian", number, entry.times]
        case Concentrated(rho=number):
            return ["concentrated", number, entry.times]


def _from_pair(kind: str, number: float, times: int) -> Spent:
    match kind:
        case "gaussian":
            return Spent(mechanism=Gaussian(noise_multiplier=number), times=times)
        case "concentrated":
            return Spent(mechanism=Concentrated(rho=number), times=times)
        case _:
            raise ValueError(f"{kind!r} is no mechanism")


def _rho(mechanism: Mechanism) -> float:
    """Give what a mechanism spends as concentrated privacy (Bun and Steinke, proposition 1.6)."""
    match mechanism:
        case Gaussian(noise_multiplier=multiplier):
            return 1.0 / (2.0 * multiplier**2)
        case Concentrated(rho=rho):
            return rho


def load_accounting() -> None:
    """Load dp-accounting now: it takes a second or two, and does nothing once it is loaded.

    Raises:
        PrivacyError: it is not installed.
    """
    _accounting()


def _accounting() -> ModuleType:
    try:
        return import_module("dp_accounting")  # it brings SciPy, which no device needs
    except ImportError as error:
        raise PrivacyError(
            "privacy is counted by the package dp-accounting; install minga[cluster]"
        ) from error


def _require_positive(name: str, value: float) -> None:
    if not (value > 0 and isfinite(value)):
        raise PrivacyError(f"{name} is {value:g}; it must be above 0 and finite")
