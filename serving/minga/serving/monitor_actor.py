"""One place on Ray where the sketches of all replicas come together.

Each replica counts for itself and ships its sketches to an actor, which joins them into windows
and judges these; every replica gets back what is known, so any scrape tells it. The actor has a
name, is made by the replica that comes first, and is started again by Ray if it dies. What it
remembers is in its folder, on the machine where it runs: it is made on the machine of that first
replica, so give replicas on several machines a folder that all of them share.

Sketches travel without their reference. The actor asks for one that it does not know.
"""

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
from minga.serving.config import MonitorConfig

ACTOR: Final = "minga-monitor"
NAMESPACE: Final = "minga"
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


def end_actor() -> None:
    """End the actor, if there is one; what it remembers stays in its folder."""
    try:
        ray.kill(ray.get_actor(ACTOR, namespace=NAMESPACE))
    except ValueError:  # Ray's way to say that there is none
        return


def _actor(config: MonitorConfig) -> Any:
    """Find the actor, or make it."""
    kind: Any = ray.remote(MonitorActor)
    return kind.options(
        name=ACTOR,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        num_cpus=0,
    ).remote(str(config.path), asdict(config.windows))
