"""What Prometheus learns of the monitor: what it knows of the versions that are served now.

Series of a version are what its newest full window came to. On Ray Serve all replicas know the
same of them, since windows are judged over all; counts of rows are each replica's own, and are
added up where a scrape tells of all (`minga.serving.totals`).
"""

from collections.abc import Iterable, Iterator
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minga.inference.monitor.observer import Observer
from minga.inference.monitor.summary import ModelSummary
from minga.inference.repository import ModelRepository

_VERSION: Final = ("model", "version")


class MonitorSeries(Collector):
    """Reads the observer at the moment of the scrape.

    Args:
        observer: of this process.
        repository: whose versions are told of.
    """

    def __init__(self, observer: Observer, repository: ModelRepository) -> None:
        self._observer = observer
        self._repository = repository

    def collect(self) -> Iterable[Metric]:
        """Give all series."""
        served = {(ref.name, ref.version) for ref in self._repository.refs}
        known = [
            summary
            for summary in self._observer.summaries
            if (summary.model, summary.version) in served
        ]
        yield from self._own()
        yield from _windows(known)
        yield from _findings(known)
        yield from _performance(known)
        yield from _alarms(known)

    def _own(self) -> Iterator[Metric]:
        observed = self._observer.observed
        for name, text, value in (
            ("rows", "Rows that were counted for the monitor.", observed.rows),
            (
                "skipped_rows",
                "Rows that were left out, since there were too many to look at.",
                observed.skipped,
            ),
            (
                "dropped_requests",
                "Requests that were not counted, since the queue was full.",
                observed.dropped,
            ),
            (
                "failed_requests",
                "Requests that the monitor could not count, by a mistake of its own.",
                observed.failed,
            ),
        ):
            yield CounterMetricFamily(f"minga_monitor_{name}", text, value=value)


def _windows(known: Iterable[ModelSummary]) -> Iterator[Metric]:
    windows = CounterMetricFamily(
        "minga_monitor_windows", "Windows of traffic that were judged.", labels=_VERSION
    )
    rows = GaugeMetricFamily(
        "minga_monitor_window_rows", "Rows of the newest window that was judged.", labels=_VERSION
    )
    outliers = GaugeMetricFamily(
        "minga_monitor_outlier_share",
        "Share of rows that are far from the training data as a whole.",
        labels=_VERSION,
    )
    for summary in known:
        version = (summary.model, summary.version)
        windows.add_metric(version, summary.windows)
        if summary.windows:
            rows.add_metric(version, summary.rows)
            outliers.add_metric(version, summary.outlier_share)
    yield from (windows, rows, outliers)


def _findings(known: Iterable[ModelSummary]) -> Iterator[Metric]:
    drift = GaugeMetricFamily(
        "minga_monitor_drift",
        "Drift of an input or a prediction: population stability index (psi), or shift of the "
        "middle in standard deviations.",
        labels=(*_VERSION, "kind", "column", "statistic"),
    )
    share = GaugeMetricFamily(
        "minga_monitor_excess_share",
        "Share of an input's values that are missing, out of range, or of an unknown category, "
        "above the training data's.",
        labels=(*_VERSION, "kind", "column"),
    )
    for summary in known:
        version = (summary.model, summary.version)
        for row in summary.findings:
            if row.statistic in ("psi", "shift"):
                drift.add_metric((*version, row.kind, row.subject, row.statistic), row.value)
            elif row.statistic == "share" and row.kind != "outliers":
                share.add_metric((*version, row.kind, row.subject), row.value)
    yield from (drift, share)


def _performance(known: Iterable[ModelSummary]) -> Iterator[Metric]:
    labels = (*_VERSION, "metric")
    estimate = GaugeMetricFamily(
        "minga_monitor_estimated_performance",
        "Measure of the newest window, estimated without labels.",
        labels=labels,
    )
    real = GaugeMetricFamily(
        "minga_monitor_performance",
        "Measure of the newest window of labels that came later.",
        labels=labels,
    )
    reference = GaugeMetricFamily(
        "minga_monitor_reference_performance", "The same measure on the test split.", labels=labels
    )
    for summary in known:
        version = (summary.model, summary.version)
        for family, measures in ((estimate, summary.estimates), (real, summary.performance)):
            for metric, (now, _) in measures.items():
                family.add_metric((*version, metric), now)
        for metric, (_, then) in {**summary.estimates, **summary.performance}.items():
            reference.add_metric((*version, metric), then)
    yield from (estimate, real, reference)


def _alarms(known: Iterable[ModelSummary]) -> Iterator[Metric]:
    raised = CounterMetricFamily(
        "minga_monitor_alarms", "Alarms that were raised.", labels=(*_VERSION, "kind")
    )
    standing = GaugeMetricFamily(
        "minga_monitor_standing_alarm",
        "1 for each alarm that was raised and not cleared since.",
        labels=(*_VERSION, "kind", "subject"),
    )
    for summary in known:
        version = (summary.model, summary.version)
        for kind, count in summary.alarms.items():
            raised.add_metric((*version, kind), count)
        for kind, subject in summary.standing:
            standing.add_metric((*version, kind, subject), 1)
    yield from (raised, standing)
