"""What Prometheus learns about inference.

Series exist only for models that are served: a label never comes from a caller, or a scan of
random URLs would fill the memory of everyone who scrapes.
"""

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from minga.inference.repository import ModelRepository
from minga.inference.side_by_side import SideBySide

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
# From a small network inline to a large one behind a queue, in seconds.
_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class InferenceMetrics:
    """Counts and times of requests, and the versions that answer them.

    Args:
        repository: whose models are listed as `minga_inference_model_info`.
        registry: where the series live; a process with several servers gives one to each.
        side_by_side: whose comparisons are listed.
    """

    def __init__(
        self,
        repository: ModelRepository,
        registry: CollectorRegistry,
        side_by_side: SideBySide | None = None,
    ) -> None:
        self._registry = registry
        self._requests = Counter(
            "minga_inference_requests",
            "Inference requests by model, version and HTTP status; model is empty if unknown.",
            ("model", "version", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "minga_inference_request_seconds",
            "Time from the first byte of a request to its response, by model.",
            ("model",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._in_progress = Gauge(
            "minga_inference_requests_in_progress",
            "Inference requests that have begun and not ended.",
            registry=registry,
        )
        self._num_in_progress = 0
        self._in_progress.set_function(lambda: self._num_in_progress)
        # Finding a series by its labels takes longer than counting in it.
        self._series: dict[tuple[str, str, int], tuple[Counter, Histogram | None]] = {}
        registry.register(_ServedModels(repository))
        registry.register(_Comparisons(side_by_side))

    def begin(self) -> None:
        """Count a request that has begun."""
        self._num_in_progress += 1

    def end(self, *, model: str, version: str, status: int, duration_s: float) -> None:
        """Count a request that has ended; `model` and `version` are empty if it named none."""
        self._num_in_progress -= 1
        series = self._series.get((model, version, status))
        if series is None:
            requests = self._requests.labels(model, version, str(status))
            series = requests, self._seconds.labels(model) if model else None
            self._series[model, version, status] = series
        requests, seconds = series
        requests.inc()
        if seconds is not None:
            seconds.observe(duration_s)

    def exposition(self) -> bytes:
        """Write all series in Prometheus' text format."""
        return generate_latest(self._registry)


class _ServedModels(Collector):
    """Lists the repository's versions at the moment of the scrape."""

    def __init__(self, repository: ModelRepository) -> None:
        self._repository = repository

    def collect(self) -> Iterable[Metric]:
        info = GaugeMetricFamily(
            "minga_inference_model_info",
            "Constant 1 for each model version being served.",
            labels=("model", "version", "sha256"),
        )
        awake = GaugeMetricFamily(
            "minga_inference_model_awake",
            "1 for each model version that is in memory, 0 for one that is loaded when asked for.",
            labels=("model", "version"),
        )
        in_memory = {model.ref for model in self._repository.awake()}
        for ref in self._repository.refs:
            info.add_metric((ref.name, ref.version, ref.sha256), 1)
            awake.add_metric((ref.name, ref.version), ref in in_memory)
        yield info
        yield awake
        yield CounterMetricFamily(
            "minga_inference_model_wakes",
            "Model versions that were loaded because a request asked for them.",
            value=self._repository.num_awakened,
        )
        yield CounterMetricFamily(
            "minga_inference_model_evictions",
            "Model versions that left the memory for others.",
            value=self._repository.num_evicted,
        )


class _Comparisons(Collector):
    """Lists the comparisons under way at the moment of the scrape."""

    def __init__(self, side_by_side: SideBySide | None) -> None:
        self._side_by_side = side_by_side

    def collect(self) -> Iterable[Metric]:
        labels = ("model", "version", "mode")
        share = GaugeMetricFamily(
            "minga_comparison_share",
            "The part of a model's requests that the version sees which is compared.",
            labels=labels,
        )
        requests = CounterMetricFamily(
            "minga_comparison_requests",
            "Requests that a version was given in a comparison; a new stage may begin at 0.",
            labels=labels,
        )
        failures = CounterMetricFamily(
            "minga_comparison_failures",
            "Those that it could not answer, through no fault of their callers.",
            labels=labels,
        )
        agreements = CounterMetricFamily(
            "minga_comparison_agreements",
            "Shadowed requests in which the version's answer agreed with the baseline's.",
            labels=labels,
        )
        for arms in self._side_by_side.arms.values() if self._side_by_side else ():
            compared = arms.comparison
            roles = (compared.baseline, arms.baseline), (compared.challenger, arms.challenger)
            for version, tally in roles:
                values = (compared.model, version, compared.mode)
                requests.add_metric(values, tally.requests)
                failures.add_metric(values, tally.failures)
            values = (compared.model, compared.challenger, compared.mode)
            share.add_metric(values, compared.share)
            agreements.add_metric(values, arms.challenger.agreements)
        yield from (share, requests, failures, agreements)
