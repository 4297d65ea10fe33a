"""What the monitor knows of each version now: for Prometheus, `minga watch status` and its page."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Self

from minga.inference.monitor.judgement import Finding, Judgement
from minga.inference.monitor.store import Store, Watched, WindowRow


@dataclass(frozen=True, slots=True, kw_only=True)
class FindingRow:
    """A finding as it is kept; see `judgement.Finding`."""

    kind: str
    subject: str
    statistic: str
    value: float
    limit: float
    p_value: float
    counts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """One version.

    Attributes:
        model: its name.
        version: of it.
        windows: how many windows of traffic were full.
        open_rows: rows in the window that fills.
        rows: of the newest full window; 0 if there was none, and all below is empty then.
        began: when that window began, in seconds since 1970.
        ended: when it was full.
        outlier_share: of its rows.
        findings: of that window, and of the newest one of labels.
        estimates: measures without labels: name to now and on the test split.
        performance: measures of the newest window of labels, in the same way.
        label_windows: how many windows of labels were full.
        standing: alarms that stand: kind and subject.
        alarms: how many alarms were raised, by kind.
    """

    model: str
    version: str
    windows: int
    open_rows: int
    rows: int = 0
    began: float = 0.0
    ended: float = 0.0
    outlier_share: float = 0.0
    findings: tuple[FindingRow, ...] = ()
    estimates: dict[str, tuple[float, float]]
    performance: dict[str, tuple[float, float]]
    label_windows: int = 0
    standing: tuple[tuple[str, str], ...] = ()
    alarms: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Give plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Self:
        """Read what `to_json` gave, also after it was JSON."""
        return cls(
            **{
                **given,
                "findings": tuple(FindingRow(**row) for row in given["findings"]),
                "standing": tuple((kind, subject) for kind, subject in given["standing"]),
                "estimates": {name: tuple(pair) for name, pair in given["estimates"].items()},
                "performance": {name: tuple(pair) for name, pair in given["performance"].items()},
            }
        )


def write_judgement(judgement: Judgement) -> dict[str, Any]:
    """Give what is kept of a judgement, as plain values."""
    return {
        "outlier_share": judgement.outlier_share,
        "findings": write_findings(judgement.findings),
        "measures": {
            performance.metric: [_short(performance.value), _short(performance.reference)]
            for performance in judgement.estimates
        },
    }


def write_findings(findings: Iterable[Finding]) -> list[list[Any]]:
    """Give findings as plain values in few words; see `findings_of`."""
    return [
        [
            finding.kind.value,
            finding.subject,
            finding.statistic,
            _short(finding.value),
            _short(finding.limit),
            _short(finding.p_value),
            finding.counts,
        ]
        for finding in findings
    ]


def summarise(store: Store) -> tuple[ModelSummary, ...]:
    """Read what is known of every version that was ever watched.

    Raises:
        MonitorError: the store cannot be read.
    """
    states = store.watched()
    labels = {(state.model, state.version): state for state in states if state.source == "labels"}
    counts = store.count_alarms()
    return tuple(
        _summary(store, state, labels.get((state.model, state.version)), dict(counts))
        for state in states
        if state.source == "traffic"
    )


def findings_of(window: WindowRow) -> tuple[FindingRow, ...]:
    """Read the findings of a closed window."""
    names = FindingRow.__slots__
    return tuple(
        FindingRow(**dict(zip(names, row, strict=True))) for row in window.judgement["findings"]
    )


def _summary(
    store: Store, state: Watched, labels: Watched | None, counts: dict[tuple[str, str, str], int]
) -> ModelSummary:
    newest = next(iter(store.windows(state, last=1)), None)
    labelled = next(iter(store.windows(labels, last=1)), None) if labels else None
    streaks = {**state.streaks, **(labels.streaks if labels else {})}
    mine = (state.model, state.version)
    return ModelSummary(
        model=state.model,
        version=state.version,
        windows=state.number - 1,
        open_rows=int(state.open.get("rows", 0)),
        rows=newest.rows if newest else 0,
        began=newest.began if newest else 0.0,
        ended=newest.ended if newest else 0.0,
        outlier_share=newest.judgement["outlier_share"] if newest else 0.0,
        findings=(findings_of(newest) if newest else ())
        + (findings_of(labelled) if labelled else ()),
        estimates=_measures_of(newest),
        performance=_measures_of(labelled),
        label_windows=labels.number - 1 if labels else 0,
        standing=tuple(sorted(key for key, streak in streaks.items() if streak.is_raised)),
        alarms={kind: count for (*key, kind), count in counts.items() if tuple(key) == mine},
    )


def _measures_of(window: WindowRow | None) -> dict[str, tuple[float, float]]:
    measures = window.judgement["measures"] if window else {}
    return {name: (now, then) for name, (now, then) in measures.items()}


def _short(value: float) -> float:
    return float(f"{value:.6g}")
