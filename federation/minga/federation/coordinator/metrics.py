"""What the coordinator tells Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from minga.federation.v1 import federation_pb2 as pb

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """The coordinator's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.connected = Gauge(
            "minga_coordinator_connected_devices",
            "Devices with an open control stream.",
            registry=self.registry,
        )
        self.enrolled = Gauge(
            "minga_coordinator_enrolled_devices",
            "Devices that are enrolled and not revoked, connected or away.",
            registry=self.registry,
        )
        self.certificate_end = Gauge(
            "minga_coordinator_certificate_end_timestamp_seconds",
            "When the newest certificate of the coordinator's ports ends, in seconds since 1970.",
            registry=self.registry,
        )
        self.authority_end = Gauge(
            "minga_coordinator_authority_end_timestamp_seconds",
            "When what issues certificates ends, in seconds since 1970: the authority, or its "
            "intermediate under an offline root.",
            registry=self.registry,
        )
        self._rounds = Counter(
            "minga_coordinator_rounds",
            "Rounds that ended, by result.",
            ["result"],
            registry=self.registry,
        )
        for result in ("committed", "aborted"):  # a rate needs the zero before the first one
            self._rounds.labels(result=result)
        self._duration = Histogram(
            "minga_coordinator_round_duration_seconds",
            "Time from invitation to commit of committed rounds.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._lost = Counter(
            "minga_coordinator_lost_devices",
            "Devices that were invited to a round and are not in its sum.",
            registry=self.registry,
        )
        self._bytes = Counter(
            "minga_coordinator_round_bytes",
            "Bytes moved by rounds that ended, by direction.",
            ["direction"],
            registry=self.registry,
        )
        self.refused = Counter(
            "minga_coordinator_refused_messages",
            "Messages of devices that were refused.",
            registry=self.registry,
        )

        self._privacy_spent = Gauge(
            "minga_coordinator_privacy_spent_epsilon",
            "Epsilon that the fleet's privacy ledger had spent after the newest private round.",
            registry=self.registry,
        )
        self._privacy_budget = Gauge(
            "minga_coordinator_privacy_budget_epsilon",
            "Epsilon that the ledger may spend in all, of the campaign of that round.",
            registry=self.registry,
        )

    def recall(self, campaigns: Iterable[pb.Campaign]) -> None:
        """Take up what outlives the process: the privacy that earlier rounds spent."""
        for campaign in campaigns:
            for record in campaign.rounds:
                self._observe_privacy(record, campaign.plan)

    def _observe_privacy(self, record: pb.Round, plan: pb.CampaignPlan) -> None:
        if record.HasField("privacy"):
            self._privacy_spent.set(record.privacy.epsilon)
            self._privacy_budget.set(plan.privacy.epsilon)

    def observe_round(self, record: pb.Round, plan: pb.CampaignPlan) -> None:
        """Count a round that ended, of a campaign with this plan."""
        self._observe_privacy(record, plan)
        committed = record.stage == pb.ROUND_STAGE_COMMITTED
        self._rounds.labels(result="committed" if committed else "aborted").inc()
        self._bytes.labels(direction="received").inc(record.bytes_received)
        self._bytes.labels(direction="sent").inc(record.bytes_sent)
        if committed:
            start, end = record.started_at.ToDatetime(), record.ended_at.ToDatetime()
            self._duration.observe((end - start).total_seconds())
            self._lost.inc(len(record.invited) - len(record.survivors))
