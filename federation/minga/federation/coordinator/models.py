"""Which model version each group of devices should run, and what the devices report."""

from collections.abc import Callable

from minga.federation.coordinator.hub import Connection, Hub, Signal
from minga.federation.coordinator.store import Store
from minga.federation.limits import MAX_REASON_CHARS
from minga.federation.v1 import federation_pb2 as pb


class PublishedModels:
    """The newest offer per group and model name; devices are told when it changes."""

    def __init__(self, *, store: Store, hub: Hub, clock: Callable[[], float]) -> None:
        self.changed = Signal()
        self._store = store
        self._hub = hub
        self._clock = clock

    def publish(self, offer: pb.ModelOffer, group: str) -> int:
        """Store an offer and push it to the group's open streams.

        Returns:
            How many devices were told now; the others hear of it when they connect.
        """
        self._store.publish_model(group, offer.name, offer.SerializeToString(), self._clock())
        connections = self._hub.connected(group)
        for connection in connections:
            connection.send(pb.SessionResponse(model_offer=offer))
        self.changed.fire()
        return len(connections)

    def offer_to(self, connection: Connection, running: pb.ModelReport) -> None:
        """Send a device that connects what it does not run yet."""
        offers = {
            offer.name: offer for group, offer in self.all() if group in ("", connection.group)
        }
        for offer in offers.values():
            if offer.digest != running.digest:
                connection.send(pb.SessionResponse(model_offer=offer))

    def all(self) -> list[tuple[str, pb.ModelOffer]]:
        """Give (group, offer), the newest last."""
        return [
            (group, pb.ModelOffer.FromString(offer))
            for group, offer in self._store.published_models()
        ]

    def blobs_in_use(self) -> set[bytes]:
        """Give the digests of all published models."""
        return {offer.digest for _, offer in self.all()}

    def needs_blob(self, digest: bytes) -> bool:
        """True if devices may fetch this blob: it is a published model."""
        return digest in self.blobs_in_use()

    def note_report(self, device_id: str, report: pb.ModelReport) -> None:
        """Remember what a device says it runs."""
        kept = pb.ModelReport()
        kept.CopyFrom(report)
        kept.detail = kept.detail[:MAX_REASON_CHARS]
        self._store.note_model(device_id, kept.SerializeToString())
        self.changed.fire()
