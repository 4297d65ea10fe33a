"""What the responder tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge

from minga.cluster.response.config import RespondConfig
from minga.cluster.response.policy import ENDS, FREE, Case


class Metrics:
    """The responder's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.messages = Counter(
            "minga_respond_messages",
            "Messages to the webhook, by the HTTP status of the answer.",
            ["status"],
            registry=self.registry,
        )
        self._firing = Gauge(
            "minga_respond_firing_alarms",
            "Alarms that may act and are not over.",
            registry=self.registry,
        )
        self._cases = Gauge(
            "minga_respond_cases",
            "Cases in the journal, by how they ended; open is the one under way.",
            ["end"],
            registry=self.registry,
        )
        self._awaited = Gauge(
            "minga_respond_awaits_approval",
            "1 while a case waits for a person.",
            registry=self.registry,
        )
        self._left = Gauge(
            "minga_respond_cases_left",
            "Cases that may still be opened in the period of the budget.",
            registry=self.registry,
        )

    def observe(
        self, num_firing: int, cases: tuple[Case, ...], config: RespondConfig, now: float
    ) -> None:
        """Tell how things stand."""
        self._firing.set(num_firing)
        for end in (None, *sorted(ENDS)):
            count = sum(case.end == end for case in cases)
            self._cases.labels(end="open" if end is None else end).set(count)
        self._awaited.set(bool(cases and cases[-1].awaited(config)))
        since = now - config.period_days * 86_400
        counted = sum(case.opened_at > since and case.end not in FREE for case in cases)
        self._left.set(max(0, config.max_cases - counted))
