"""What a round asks of its devices: to train a model, to measure it, or about their data.

Whatever it is, a device answers with one vector and one weight, and all that the coordinator makes
of them is the weighted mean; so every kind of work goes through secure aggregation alike.

All members of a round must be asked the same: a coordinator that asks the victim something else
than the others could make the sum the victim's answer. So the plan of a secure round binds what
`subject` gives, computed by each device from what it was really asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import isfinite
from typing import Final

import numpy as np
from numpy.typing import NDArray

from minga.federation.analytics import Question
from minga.federation.errors import PeerError
from minga.federation.limits import (
    MAX_METRIC_NAME_CHARS,
    MAX_METRICS,
    MAX_PATTERN_CHARS,
    MAX_PATTERNS,
)
from minga.federation.secagg.encoding import encode

MAX_VALUE_BITS: Final = 24
"""Short vectors are rounded to so many bits a value, where the cohort leaves room for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """Train the model and send what changed."""

    def num_values(self, model_values: int) -> int:
        """Length of a device's vector, for a model of so many values."""
        return model_values

    def subject(self, model_digest: bytes) -> bytes:
        """Give what a secure round's plan binds beside the training's parameters."""
        return model_digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Measure the model and send the metrics; a device may lack some.

    The vector holds each metric's value, then for each metric whether the device has it. So each
    mean is over the examples of those that have it.

    Raises:
        PeerError: names or clip cannot work.
    """

    metrics: tuple[str, ...]
    """Names, sorted; others that a device measures are not sent."""
    clip: float
    """Values are clipped to [-clip, clip]."""

    def __post_init__(self) -> None:
        names = self.metrics
        if not 0 < len(names) <= MAX_METRICS or list(names) != sorted(set(names)):
            raise PeerError(f"an evaluation has 1 to {MAX_METRICS} metrics, sorted, each once")
        if not all(0 < len(n) <= MAX_METRIC_NAME_CHARS and n.isprintable() for n in names):
            raise PeerError(f"names of metrics are printable, up to {MAX_METRIC_NAME_CHARS} long")
        if not (isfinite(self.clip) and self.clip > 0):
            raise PeerError(f"metrics are clipped to {self.clip}; give a positive number")

    def num_values(self, model_values: int) -> int:  # noqa: ARG002 - as in `Training`
        """Length of a device's vector."""
        return 2 * len(self.metrics)

    def subject(self, model_digest: bytes) -> bytes:
        """Give what a secure round's plan binds beside the training's parameters."""
        return sha256(encode("evaluation", model_digest, *self.metrics, float(self.clip))).digest()

    def vector_of(self, measured: Mapping[str, float]) -> NDArray[np.float32]:
        """Write metrics as a device's vector, shape `(2 * len(metrics),)`.

        Args:
            measured: name -> value; one that is NaN or infinite counts as missing.
        """
        has = np.array([isfinite(measured.get(name, np.nan)) for name in self.metrics])
        values = [measured[n] if ok else 0.0 for n, ok in zip(self.metrics, has, strict=True)]
        vector = np.concatenate([np.clip(values, -self.clip, self.clip), has * self.clip])
        return vector.astype(np.float32)

    def metrics_of(self, mean: NDArray[np.float32]) -> dict[str, float]:
        """Read the weighted means over those devices that have a metric; one that none has is out.

        Args:
            mean: weighted mean of the devices' vectors, shape `(2 * len(metrics),)`.
        """
        values, shares = np.split(mean.astype(np.float64), 2)
        least = self.clip * 2.0**-MAX_VALUE_BITS  # below it is what rounding leaves of zero
        return {
            name: float(np.clip(value / share, -1, 1) * self.clip)
            for name, value, share in zip(self.metrics, values, shares, strict=True)
            if share > least
        }


Work = Training | Evaluation | Question


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """How the devices of a campaign learn, beyond training a model that is everybody's.

    Raises:
        PeerError: a pattern cannot be one.
    """

    personal: tuple[str, ...] = ()
    """Tensors whose names match one of these patterns never leave a device."""
    scaffold: bool = False
    """Gradients are corrected by control variates, which travel with the model."""

    def __post_init__(self) -> None:
        if len(self.personal) > MAX_PATTERNS or not all(
            0 < len(p) <= MAX_PATTERN_CHARS and p.isprintable() for p in self.personal
        ):
            raise PeerError(
                f"personal tensors are named by up to {MAX_PATTERNS} patterns of 1 to "
                f"{MAX_PATTERN_CHARS} printable characters"
            )

    @property
    def keeps_state(self) -> bool:
        """True if devices keep something from round to round."""
        return bool(self.personal) or self.scaffold

    def subject(self, model_digest: bytes) -> bytes:
        """Give what a secure round's plan binds for the model."""
        if not self.keeps_state:
            return model_digest
        return sha256(encode("method", model_digest, self.scaffold, *self.personal)).digest()


USUAL_METHOD: Final = Method()
"""Everybody trains one model."""

TRAINING: Final = Training()
"""The usual work."""


def value_bits(work: Work, asked: int, cohort: int) -> int:
    """Say to how many bits a device's values are rounded.

    Args:
        work: what is asked.
        asked: bits of an update's coordinate in this campaign.
        cohort: devices in one sum.
    """
    if isinstance(work, Training):
        return asked
    return max(asked, min(MAX_VALUE_BITS, 32 - (cohort - 1).bit_length()))


def new_evaluation(metrics: Sequence[str], clip: float) -> Evaluation:
    """Make an evaluation of metrics in any order."""
    return Evaluation(metrics=tuple(sorted(set(metrics))), clip=clip)
