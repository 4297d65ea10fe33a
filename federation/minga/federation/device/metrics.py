"""What a device tells Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """A device's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.connected = Gauge(
            "minga_device_connected",
            "1 while the control stream is open.",
            registry=self.registry,
        )
        self.certificate_end = Gauge(
            "minga_device_certificate_end_timestamp_seconds",
            "When this device's certificate ends, in seconds since 1970.",
            registry=self.registry,
        )
        self.rounds = Counter(
            "minga_device_rounds",
            "Rounds that this device was in, by how they ended for it.",
            ["result"],
            registry=self.registry,
        )
        self.training = Histogram(
            "minga_device_training_seconds",
            "Time of local training per round.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.model = Gauge(
            "minga_device_model_info",
            "1 for the model version that is active.",
            ["name", "version"],
            registry=self.registry,
        )
