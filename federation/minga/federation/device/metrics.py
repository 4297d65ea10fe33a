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
        self.link_rate = Gauge(
            "minga_device_link_bytes_per_second",
            "What the link carried in the newest transfers: down to this device, or up.",
            ["way"],
            registry=self.registry,
        )
        self.blob_content_bytes = Counter(
            "minga_device_blob_content_bytes",
            "Bytes of models and updates that were moved, unpacked.",
            ["way"],
            registry=self.registry,
        )
        self.blob_wire_bytes = Counter(
            "minga_device_blob_wire_bytes",
            "Bytes that these took on the link; packed chunks take fewer.",
            ["way"],
            registry=self.registry,
        )
