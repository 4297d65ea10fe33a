"""One place on Ray where the sketches of all replicas come together.

Each replica counts for itself and ships its sketches to an actor, which joins them into windows
and judges these; every replica gets back what is known, so any scrape tells it. The actor is named
after its folder and its windows: an application that is deployed anew with another folder gets
another actor. What it remembers is in its folder, on the machine where it runs: it is made on the
machine of the replica that comes first, so give replicas on several machines a folder that all of
them share.

Sketches travel without their reference. The actor asks for one that it does not know.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import GetTimeoutError, RayError

from minga.inference.errors import MonitorError
from minga.inference.monitor.keeper import Keeper, Windows
from minga.inference.monitor.reference import Reference
from minga.inference.monitor.summary import ModelSummary
from minga.inference.monitor.traffic import Traffic
from minga.serving.actors import shared_actor
from minga.serving.config import MonitorConfig

_TIMEOUT_S: Final = 30.0


class MonitorActor:
    """A keeper in a process of its own.

    Args:
        folder: where it remembers.
        windows: the fields of `minga.inference.monitor.keeper.Windows`.
    """

    def __init__(self, folder: str, windows: Mapping[str, Any]) -> None:
        self._keeper = Keeper(Path(folder), Windows(**windows))
        self._references: dict[str, Reference] = {}

    def take(
        self, traffic: Sequence[dict[str, Any]], references: Mapping[str, str]
    ) -> dict[str, Any]:
        """Take traffic as plain values.

        Args:
            traffic: see `Traffic.to_json`.
            references: digest -> JSON text, of those that were asked for.

        Returns:
            `unknown`, the digests of references that are missing, in which case nothing was taken;
            or `summaries`.
        """
        for text in references.values():
            reference = Reference.parse(text)
            self._references[reference.digest] = reference
        wanted = {one["sketch"]["reference"] for one in traffic}
        unknown = sorted(wanted - self._references.keys())
        if unknown:
            return {"unknown": unknown}
        summaries = self._keeper.take(
            [
                Traffic.from_json(one, self._references[one["sketch"]["reference"]])
                for one in traffic
            ]
        )
        return {"summaries": [summary.to_json() for summary in summaries]}


class ActorSink:
    """A `Sink` that ships to the actor.

    A call without an answer in time counts as taken: rather a second of traffic lost than counted
    twice.

    Args:
        config: how to watch.
    """

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        self._actor: Any = None

    def take(self, traffic: Sequence[Traffic]) -> Sequence[ModelSummary]:
        """See `Sink.take`."""
        given = [one.to_json() for one in traffic]
        try:
            answer = self._ask(given, {})
            if "unknown" in answer:
                texts = {one.reference.digest: one.reference.text for one in traffic}
                answer = self._ask(given, {name: texts[name] for name in answer["unknown"]})
        except GetTimeoutError:
            return ()
        except RayError as error:
            self._actor = None
            raise MonitorError(f"the monitor's actor does not answer: {error}") from error
        return tuple(ModelSummary.from_json(one) for one in answer["summaries"])

    def _ask(
        self, traffic: Sequence[dict[str, Any]], references: Mapping[str, str]
    ) -> dict[str, Any]:
        if self._actor is None:
            self._actor = _actor(self._config)
        answer: dict[str, Any] = ray.get(
            self._actor.take.remote(traffic, references), timeout=_TIMEOUT_S
        )
        return answer


def _actor(config: MonitorConfig) -> Any:
    """Find the actor, or make it."""
    folder, windows = str(config.path), asdict(config.windows)
    digest = hashlib.sha256(repr((folder, windows)).encode()).hexdigest()
    return shared_actor(MonitorActor, f"monitor-{digest[:16]}", folder, windows)
