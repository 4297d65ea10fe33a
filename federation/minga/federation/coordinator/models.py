"""Which model version each group of devices should run, and what the devices report."""

from collections.abc import Callable

from minga.federation import wire
from minga.federation.coordinator.audit_log import AuditLog, Kind
from minga.federation.coordinator.hub import Hub
from minga.federation.coordinator.store import Store
from minga.federation.v1 import federation_pb2 as pb


class PublishedModels:
    """The newest offer per group and model name; devices are told when it changes."""

    def __init__(
        self, *, store: Store, hub: Hub, audit: AuditLog, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._hub = hub
        self._audit = audit
        self._clock = clock

    def publish(self, offer: pb.ModelOffer, group: str, by: str) -> int:
        """Store an offer and push it to the group's open streams.

        Args:
            offer: The model version.
            group: Whom to offer it; empty: all.
            by: Who publishes it, for the audit log.

        Returns:
            How many devices were told now; the others hear of it when they connect.

        Raises:
            PeerError: no device could keep a model of this name, version or digest.
        """
        wire.check_model(offer.name, offer.version, offer.digest)
        with self._store.transaction():
            self._store.publish_model(group, offer.name, offer.SerializeToString(), self._clock())
            self._audit.append(
                Kind.MODEL_PUBLISHED,
                f"model/{offer.name}",
                version=offer.version,
                digest=offer.digest.hex(),
                group=group,
                by=by,
            )
        message = pb.SessionResponse(model_offer=offer)
        return sum(connection.send(message) for connection in self._hub.connected(group))

    def offers_to(self, group: str, running: pb.ModelReport) -> list[pb.SessionResponse]:
        """Give a device that connects the newest offer for each model, as far as it needs it.

        A device says of one model only what it runs; what else it has it knows by itself.
        """
        newest = {offer.name: offer for owner, offer in self.all() if owner in ("", group)}
        return [
            pb.SessionResponse(model_offer=offer)
            for offer in newest.values()
            if (offer.version, offer.digest) != (running.version, running.digest)
        ]

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
        """Remember what a device says it runs; what is new goes into the audit log as well.

        So it can be told later which version ran where and when.

        Raises:
            PeerError: the report is malformed.
        """
        known = wire.model_report(report).SerializeToString()
        device = self._store.device(device_id)
        if device is not None and device.model == known:
            return
        # Limited, for a device could report this and that without an end. Written first: of a
        # coordinator that dies in between the log tells it twice, not never.
        self._audit.append_limited(
            Kind.MODEL_REPORTED,
            f"device/{device_id}",
            model=report.name,
            version=report.version,
            digest=report.digest.hex(),
            state=_name_of(report.state),
        )
        self._store.note_model(device_id, known)


def _name_of(state: "pb.ModelState.ValueType") -> str:
    """Name a state as listings do; a device may also send a number that has no name."""
    if state not in pb.ModelState.values():
        return str(state)
    return pb.ModelState.Name(state).removeprefix("MODEL_STATE_").lower()
