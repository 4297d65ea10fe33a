"""Adds up the series of replicas, so that a scrape of any of them tells of the whole service.

Prometheus reaches one replica after another behind one address. If each told what it counted
alone, the counters would jump, each fall would be taken for a restart, and every rate be wrong.
So counters and histograms are sums over all replicas that ever were, and never fall: what a
replica has told is kept when it ends, is killed, or begins a count anew. Of gauges the replicas
that live tell. The kinds are those of `prometheus_client`'s multiprocess mode.

Nothing here knows of Ray; see `metrics_actor`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

Series = tuple[str, tuple[tuple[str, str], ...]]
"""A sample's name and its labels."""

SILENT_S: Final = 10.0
"""A replica that told nothing for so long has no present any more."""

_FORGOTTEN_S: Final = 3600.0  # one that comes back earlier is not counted twice

_ADDED: Final = frozenset({"minga_inference_requests_in_progress"})
"""Gauges that are sums; of any other gauge every replica tells the same, or the largest holds."""

_COMMON: Final = frozenset({"minga_monitor_windows", "minga_monitor_alarms"})
"""Counters of what is judged over all replicas, which each of them tells whole."""

_PASSING: Final = "minga_comparison_"
"""Families whose series end with what they tell of; others never end."""

_BIRTH: Final = "_created"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Series of one name at one replica.

    Attributes:
        name: without the endings of its samples.
        text: what it means.
        kind: Prometheus' type.
        samples: the value of each series, in the order in which they are told.
    """

    name: str
    text: str
    kind: str
    samples: Mapping[Series, float]

    @property
    def is_summed(self) -> bool:
        """Whether it counts what each replica did, and so is kept when one ends."""
        return self.kind in ("counter", "histogram") and self.name not in _COMMON


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepsake:
    """What a replica remembers of the sums, for sums that were lost.

    Attributes:
        sums: of all replicas, by family.
        told: what the replica itself had told when it heard them.
    """

    sums: Mapping[str, Mapping[Series, float]]
    told: Sequence[Family]


@dataclass(slots=True, kw_only=True)
class _Told:
    """What a replica told last."""

    at: float
    families: dict[str, Family] = field(default_factory=dict)


def families_of(collector: Collector) -> list[Family]:
    """Read all series of one process."""
    return [
        Family(
            name=metric.name,
            text=metric.documentation,
            kind=metric.type,
            samples={
                (one.name, tuple(sorted(one.labels.items()))): one.value for one in metric.samples
            },
        )
        for metric in collector.collect()
    ]


class Totals:
    """What all replicas together tell."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[Series, float]] = {}
        self._told: dict[str, _Told] = {}

    @property
    def sums(self) -> Mapping[str, Mapping[Series, float]]:
        """The sums, by family."""
        return self._sums

    def restore(self, replica: str, keepsake: Keepsake, now: float) -> None:
        """Take back sums that were lost, from a replica that has them.

        Several may do so, each with the sums of another moment: the largest hold. What replicas
        counted between those moments, a second apart, may be missing in the end.
        """
        for name, sums in keepsake.sums.items():
            known = self._sums.setdefault(name, {})
            for series, value in sums.items():
                known[series] = _joined(series, known.get(series), value)
        families = {family.name: family for family in keepsake.told}
        self._told.setdefault(replica, _Told(at=now, families=families))

    def hear(self, replica: str, families: Iterable[Family], now: float) -> None:
        """Take what a replica tells now.

        Args:
            replica: names it, and no other one, nor its successor.
            families: all that it has.
            now: a clock's seconds.
        """
        told = self._told.get(replica) or _Told(at=now)
        heard = _Told(at=now, families={family.name: family for family in families})
        for family in heard.families.values():
            if family.is_summed:
                before = told.families.get(family.name)
                self._add(family, before.samples if before else {})
        self._told[replica] = heard
        for name in [name for name, one in self._told.items() if now - one.at > _FORGOTTEN_S]:
            del self._told[name]

    def leave(self, replica: str) -> None:
        """Forget the present of a replica that has ended; what it counted stays."""
        self._told.pop(replica, None)

    def families(self, now: float) -> list[Family]:
        """Give the series of the whole."""
        living = [told.families for told in self._told.values() if now - told.at <= SILENT_S]
        heads = {name: family for families in living for name, family in families.items()}
        return [
            Family(name=name, text=head.text, kind=head.kind, samples=self._whole(head, living))
            for name, head in heads.items()
        ]

    def _add(self, family: Family, before: Mapping[Series, float]) -> None:
        sums = self._sums.setdefault(family.name, {})
        for series, value in family.samples.items():
            if series[0].endswith(_BIRTH):
                sums[series] = _joined(series, sums.get(series), value)
                continue
            known = before.get(series, 0.0)
            # A count that fell began anew, as the next stage of a comparison does.
            sums[series] = sums.get(series, 0.0) + (value - known if value >= known else value)

    def _whole(self, head: Family, living: Sequence[Mapping[str, Family]]) -> dict[Series, float]:
        tellers = [families[head.name] for families in living if head.name in families]
        if head.is_summed:
            sums = self._sums.get(head.name, {})
            if not head.name.startswith(_PASSING):
                return dict(sums)
            told = {series for family in tellers for series in family.samples}
            return {series: value for series, value in sums.items() if series in told}
        samples: dict[Series, float] = {}
        for family in tellers:
            for series, value in family.samples.items():
                known = samples.get(series)
                if known is None:
                    samples[series] = value
                else:
                    samples[series] = known + value if head.name in _ADDED else max(known, value)
        return samples


class Given(Collector):
    """Families as `prometheus_client` writes them.

    Args:
        families: to be written.
    """

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Give all series."""
        for family in self._families:
            metric = Metric(family.name, family.text, family.kind)
            for (name, labels), value in family.samples.items():
                metric.add_sample(name, dict(labels), value)
            yield metric


def _joined(series: Series, known: float | None, value: float) -> float:
    """Join two accounts of one sum; of the moments when a count began the first holds."""
    if known is None:
        return value
    return min(known, value) if series[0].endswith(_BIRTH) else max(known, value)
