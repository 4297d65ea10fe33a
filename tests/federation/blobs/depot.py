"""A coordinator's blob service alone, for tests."""

from pathlib import Path

import grpc

from minga.federation.blobs import BlobStore
from minga.federation.coordinator.blob_service import BlobServicer
from minga.federation.errors import PeerError
from minga.federation.identity import Principal
from minga.federation.limits import MIB


class Depot:
    """A coordinator's blob service with its store and its policy."""

    def __init__(self, folder: Path) -> None:
        self.store = BlobStore(folder, max_blob_bytes=16 * MIB, sender_quota_bytes=24 * MIB)
        self.received: dict[str, int] = {}
        self.sent: dict[str, int] = {}
        self.refused: set[bytes] = set()
        self.num_asked = 0
        self.complaints: list[tuple[str, bytes]] = []

    def may_upload(self, principal: Principal, digest: bytes, size: int) -> bool:
        """Refuse what the test refuses."""
        self.num_asked += 1
        return digest not in self.refused

    def may_download(self, principal: Principal, digest: bytes) -> bool:
        """Refuse what the test refuses."""
        return digest not in self.refused

    def on_transfer(self, principal: Principal, *, received: int, sent: int) -> None:
        """Add up."""
        self.received[principal.name] = self.received.get(principal.name, 0) + received
        self.sent[principal.name] = self.sent.get(principal.name, 0) + sent

    def on_refused(self, principal: Principal, *, digest: bytes, error: PeerError) -> None:
        """Take note."""
        self.complaints.append((principal.name, digest))

    def add_services(self, server: grpc.aio.Server) -> None:
        """Serve blobs."""
        servicer = BlobServicer(
            self.store,
            may_upload=self.may_upload,
            may_download=self.may_download,
            on_transfer=self.on_transfer,
            on_refused=self.on_refused,
        )
        servicer.add_to(server)
