"""What one process has seen of one version since it last told, in a form that can be sent."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from minga.inference.monitor.reference import Reference
from minga.inference.monitor.sketch import Sketch
from minga.inference.monitor.store import Prediction
from minga.inference.monitor.summary import ModelSummary


@dataclass(eq=False, kw_only=True)
class Traffic:
    """Requests of one version, counted.

    Attributes:
        model: its name.
        version: of it.
        began: when the first of them was counted, in seconds since 1970.
        sketch: the counts.
        predictions: answers to requests that have an id.
    """

    model: str
    version: str
    began: float
    sketch: Sketch
    predictions: list[Prediction] = field(default_factory=list)

    @property
    def reference(self) -> Reference:
        """What the version is compared with."""
        return self.sketch.reference

    def to_json(self) -> dict[str, Any]:
        """Give plain values; of the reference only its digest."""
        return {
            "model": self.model,
            "version": self.version,
            "began": self.began,
            "sketch": self.sketch.to_json(),
            "predictions": [asdict(prediction) for prediction in self.predictions],
        }

    @classmethod
    def from_json(cls, given: dict[str, Any], reference: Reference) -> "Traffic":
        """Read what `to_json` gave.

        Raises:
            ValueError: it was counted by another reference's bins.
        """
        return cls(
            model=given["model"],
            version=given["version"],
            began=given["began"],
            sketch=Sketch.from_json(reference, given["sketch"]),
            predictions=[Prediction(**prediction) for prediction in given["predictions"]],
        )


class Sink(Protocol):
    """Takes traffic from the processes that answer requests, and joins it into windows."""

    def take(self, traffic: Sequence[Traffic]) -> Sequence[ModelSummary]:
        """Take what was seen since the last call, if anything; all of it or none.

        Returns:
            What the monitor knows now, of all versions.

        Raises:
            MonitorError: it cannot be taken now; nothing has changed.
        """
        ...
