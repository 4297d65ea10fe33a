"""What a client shows to a server: an API key, a certificate, and whose servers it trusts."""

import ipaddress
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minga.inference.errors import ClientError


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """A client's credentials. Neither its text nor its errors show the key.

    Attributes:
        key: the API key; empty means none.
        ca: who signs servers' certificates, PEM; None means whom this machine trusts.
        certificate: the client's certificate chain, PEM, for mutual TLS.
        certificate_key: its private key, PEM.
    """

    key: str = field(default="", repr=False)
    ca: Path | None = None
    certificate: Path | None = None
    certificate_key: Path | None = None

    @classmethod
    def from_environment(cls) -> "Credentials":
        """Read MINGA_API_KEY or MINGA_API_KEY_FILE, MINGA_API_CA, MINGA_API_CERTIFICATE(_KEY).

        Raises:
            ClientError: the file of the key cannot be read.
        """

        def path(name: str) -> Path | None:
            return Path(value) if (value := os.environ.get(name)) else None

        key = os.environ.get("MINGA_API_KEY", "").strip()
        if not key and (file := path("MINGA_API_KEY_FILE")):
            key = read_key(file)
        return cls(
            key=key,
            ca=path("MINGA_API_CA"),
            certificate=path("MINGA_API_CERTIFICATE"),
            certificate_key=path("MINGA_API_CERTIFICATE_KEY"),
        )

    def headers(self, *, host: str, is_secure: bool) -> Mapping[str, str]:
        """Give what goes with every request.

        Raises:
            ClientError: the key would travel over a network in the clear, or is no header's text.
        """
        if not self.key:
            return {}
        if not is_secure and not is_loopback(host):
            raise ClientError(
                f"an API key is not sent to {host} in the clear; use https:// or grpcs://"
            )
        if not self.key.isascii() or not self.key.isprintable():
            raise ClientError("the API key has characters that no key has; was it cut or pasted?")
        return {"authorization": f"Bearer {self.key}"}

    def context(self) -> ssl.SSLContext:
        """Make the TLS context of HTTP.

        Raises:
            ClientError: a file is not there, or not what it should be.
        """
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.certificate:
                context.load_cert_chain(self.certificate, self.certificate_key)
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        return context

    def channel_credentials(self) -> Any:
        """Make the TLS credentials of gRPC.

        Raises:
            ClientError: a file is not there, or not what it should be.
        """
        import grpc  # noqa: PLC0415 - HTTP needs none of it

        self.context()  # gRPC itself only logs what is wrong
        files = (self.ca, self.certificate_key or self.certificate, self.certificate)
        root, key, chain = (file.read_bytes() if file else None for file in files)
        return grpc.ssl_channel_credentials(root, key, chain)

    def _unusable(self, error: Exception) -> ClientError:
        files = " and ".join(str(file) for file in (self.ca, self.certificate) if file)
        reason = error.strerror if isinstance(error, OSError) else None
        return ClientError(f"TLS cannot be set up from {files}: {reason or error}")


def read_key(file: Path) -> str:
    """Read the API key that is a file's first line.

    Raises:
        ClientError: the file cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8").partition("\n")[0].strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ClientError(f"cannot read the API key in {file}: {reason}") from error


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
