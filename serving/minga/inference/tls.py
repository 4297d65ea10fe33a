"""TLS of inference servers: the same files for HTTP and gRPC."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minga.inference.errors import AccessError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTls:
    """What a server shows, and whom it asks to show something.

    Attributes:
        certificate: its certificate chain, PEM.
        key: the private key, PEM, not encrypted.
        client_ca: who signs the certificates that clients may show, PEM; None asks for none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Make the context of HTTP: TLS 1.2 or newer.

        Clients may show a certificate and need not, since probes of health have none; whoever
        shows a wrong one is refused.

        Raises:
            AccessError: a file is not there, or not what it should be.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # An encrypted key would be asked for on the terminal; this password fails instead.
            context.load_cert_chain(self.certificate, self.key, password=lambda: b"")
            if self.client_ca:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_OPTIONAL
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise AccessError(
                f"the server's TLS cannot be set up from {self.certificate}, {self.key}"
                f"{f' and {self.client_ca}' if self.client_ca else ''}: {reason or error}"
            ) from error
        return context

    def credentials(self) -> Any:
        """Make the credentials of gRPC, where every client must show a certificate if one may.

        Raises:
            AccessError: a file is not there, or not what it should be.
        """
        import grpc  # noqa: PLC0415 - HTTP needs none of it

        self.context()  # gRPC itself only logs what is wrong
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=self.client_ca.read_bytes() if self.client_ca else None,
            require_client_auth=self.client_ca is not None,
        )
