"""What one version did with its part of the traffic, small enough to send and to add up.

Times are counted in buckets an eighth of an octave wide, so sums over replicas are exact and a
quantile is right within 5 %. Predictions are a uniform sample (Vitter, "Random Sampling with a
Reservoir", ACM TOMS 1985), one row of a request, since rows of one request are alike.
"""

import math
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

import numpy as np

from minga.inference.tensors import Array

_BUCKETS_PER_OCTAVE: Final = 8
_SAMPLE: Final = 1000
_TEXTS: Final = 4096  # different texts are told apart by a hash this large


@dataclass(slots=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations (Welford 1962; Chan et al. 1979 to add two)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.merge(Moments(count=1, mean=value))

    def merge(self, other: "Moments") -> None:
        """Count all that the other counted."""
        total = self.count + other.count
        if total == 0:
            return
        gap = other.mean - self.mean
        self.squares += other.squares + gap * gap * self.count * other.count / total
        self.mean += gap * other.count / total
        self.count = total

    @property
    def variance(self) -> float:
        """The unbiased variance; 0 of fewer than two values."""
        return self.squares / (self.count - 1) if self.count > 1 else 0.0


@dataclass(slots=True, kw_only=True)
class Tally:
    """What one version did.

    Attributes:
        requests: how many it was given, failed ones included.
        failures: how many it could not answer, through no fault of their callers.
        times: requests by the bucket of their time.
        predictions: a sample of what it predicted, a number each.
        num_predictions: of how many that is a sample.
        outcomes: what callers reported of its answers.
        pairs: shadowed requests whose two answers could be compared.
        agreements: those in which the answers agreed.
        gap: by how much numbers differed.
    """

    requests: int = 0
    failures: int = 0
    times: dict[int, int] = field(default_factory=dict)
    predictions: list[float] = field(default_factory=list)
    num_predictions: int = 0
    outcomes: Moments = field(default_factory=Moments)
    pairs: int = 0
    agreements: int = 0
    gap: Moments = field(default_factory=Moments)

    def answered(self, seconds: float, outputs: Iterable[Array]) -> None:
        """Count a request that was answered with these outputs, the model's first one first."""
        self.requests += 1
        bucket = round(_BUCKETS_PER_OCTAVE * math.log2(max(seconds, 1e-9) * 1e6))
        self.times[bucket] = self.times.get(bucket, 0) + 1
        value = prediction_of(next(iter(outputs), None))
        if value is None:
            return
        self.num_predictions += 1
        if len(self.predictions) < _SAMPLE:
            self.predictions.append(value)
        elif (slot := random.randrange(self.num_predictions)) < _SAMPLE:  # noqa: S311 - no secret
            self.predictions[slot] = value

    def failed(self) -> None:
        """Count a request that could not be answered."""
        self.requests += 1
        self.failures += 1

    def quantile_s(self, share: float) -> float:
        """Give the time within which this share of the requests was answered; 0 of none."""
        return quantile_s(self.times, share)

    @classmethod
    def sum(cls, tallies: Sequence[Self]) -> Self:
        """Add up what several replicas counted."""
        total = cls()
        seen = sum(tally.num_predictions for tally in tallies)
        for tally in tallies:
            total.requests += tally.requests
            total.failures += tally.failures
            total.pairs += tally.pairs
            total.agreements += tally.agreements
            for bucket, count in tally.times.items():
                total.times[bucket] = total.times.get(bucket, 0) + count
            total.outcomes.merge(tally.outcomes)
            total.gap.merge(tally.gap)
            # A part of a sample is one too; each replica's is as large as its share of the whole.
            part = math.ceil(_SAMPLE * tally.num_predictions / seen) if seen else 0
            total.predictions.extend(tally.predictions[:part])
        total.num_predictions = seen
        return total


def quantile_s(times: Mapping[int, int], share: float) -> float:
    """Give the time, in seconds, below which this share of counted requests lies; 0 of none."""
    rank = share * sum(times.values())
    for bucket in sorted(times):
        rank -= times[bucket]
        if rank <= 0:
            return float(2 ** (bucket / _BUCKETS_PER_OCTAVE)) / 1e6
    return 0.0


def slower_than(times: Mapping[int, int], seconds: float) -> int:
    """Count the requests that took longer."""
    limit = _BUCKETS_PER_OCTAVE * math.log2(max(seconds, 1e-9) * 1e6)
    return sum(count for bucket, count in times.items() if bucket > limit)


def prediction_of(output: Array | None) -> float | None:
    """Give a number for the first row of an output; None if it has none.

    One number is itself, several are the place of the largest (a class), and texts are told
    apart by a hash. What is no finite number counts as infinity.
    """
    if output is None or output.size == 0:
        return None
    row = output[:1].ravel() if output.ndim else output.ravel()
    if row.size == 0:
        return None
    if row.dtype == object:
        text = row[0] if isinstance(row[0], bytes) else str(row[0]).encode()
        return float(zlib.crc32(text) % _TEXTS)
    value = float(row[0]) if row.size == 1 else float(np.argmax(row))
    return value if math.isfinite(value) else math.inf


def compare(baseline: Mapping[str, Array], challenger: Mapping[str, Array], into: Tally) -> None:
    """Count whether two versions' answers to one request agree: in all outputs, in every row.

    Rows of several numbers agree when the largest is at the same place; single numbers agree
    within 1 % of the larger one; all else agrees when it is equal.
    """
    into.pairs += 1
    is_equal = baseline.keys() == challenger.keys()
    for name in baseline.keys() & challenger.keys():
        left, right = baseline[name], challenger[name]
        if left.shape != right.shape or left.dtype != right.dtype:
            is_equal = False
            continue
        is_number = left.dtype.kind == "f"
        if is_number and left.size:
            with np.errstate(invalid="ignore"):
                gaps = np.abs(left.astype(float) - right.astype(float))
            gap = float(np.fmax.reduce(gaps, axis=None, initial=0.0))
            if math.isfinite(gap):
                into.gap.add(gap)
        if is_number and left.ndim > 1 and left.shape[-1] > 1:
            agrees = (left.argmax(-1) == right.argmax(-1)).all()
        elif is_number:
            agrees = np.allclose(left, right, rtol=0.01, atol=1e-6, equal_nan=True)
        else:
            agrees = (left == right).all()
        is_equal = is_equal and bool(agrees)
    into.agreements += is_equal
