"""How models are served: the `[serving]` table of minga.toml."""

import math
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from minga.inference.access import Protection
from minga.inference.errors import AccessError
from minga.inference.limits import Limits


class ServingConfig(BaseModel):
    """Where and how the champion is served."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    host: str = Field("127.0.0.1", min_length=1)
    """The address to listen on. Beyond 127.0.0.1 callers must be known, by `keys` or
    `client_ca`, unless `allow_anonymous` says otherwise."""

    port: int = Field(8000, ge=0, le=65535)
    """The port to listen on; 0 takes a free one."""

    grpc_port: int | None = Field(None, ge=0, le=65535)
    """The port to listen on for gRPC, at the same host; 0 takes a free one, and without one there
    is no gRPC. Replicas on one machine share it: each connection is one replica's."""

    keys: str = ""
    """The file of API keys (`minga key create`); by default `.minga/keys.json`, if it is there
    when serving begins. With one, requests need a key, all but those for the server's health."""

    tls_certificate: str = ""
    """The server's certificate chain, PEM; with it and `tls_key` both wires speak TLS alone."""

    tls_key: str = ""
    """The certificate's private key, PEM, not encrypted."""

    client_ca: str = ""
    """Who signs clients' certificates, PEM. One that it signed does for a key (mutual TLS), and
    over gRPC is a must. With `--engine local` only."""

    open_metrics: bool = False
    """Let `/metrics` be read without a key."""

    allow_anonymous: bool = False
    """Answer everyone who reaches the port, also beyond this machine."""

    num_replicas: int = Field(1, ge=1)
    """Processes that answer, each with all models in memory."""

    cpus_per_replica: float = Field(1.0, gt=0)
    """What Ray reserves for each replica; requests slower than a millisecond compute on as many
    threads, rounded up."""

    max_ongoing_requests: int = Field(128, ge=1)
    """Requests that a replica takes at once; more wait in the proxy."""

    max_body_mb: float = Field(32.0, gt=0)
    """The longest request body, before and after decompression."""

    max_batch_rows: int = Field(64, ge=1)
    """Rows of requests that wait at the same time are computed together, up to this many; 1 lets
    each request compute alone."""

    model_control: bool = False
    """Let callers load and unload models (`/v2/repository`), with `--engine local` only. Anyone
    who reaches the port may then take a model away."""

    alias: str = Field("champion", min_length=1)
    """Which registered version is served: the one with this alias."""

    poll_interval_s: float = Field(1.0, gt=0)
    """How often the registry is asked whether the alias has moved."""

    rollout_timeout_s: float = Field(60.0, gt=0)
    """How long a new version may take to load on every replica."""

    fast_ingress: bool = False
    """Let HAProxy take the requests instead of Ray Serve's Python proxy, which answers many times
    more of them. Off by default: HAProxy's statistics and metrics then listen on every interface
    without authentication, on free ports, and cannot be bound to 127.0.0.1."""

    def anchored(self, folder: Path) -> Self:
        """Give the configuration with absolute names of files, which are relative to a folder."""
        names = ("keys", "tls_certificate", "tls_key", "client_ca")
        given = {name: getattr(self, name) for name in names}
        return self.model_copy(
            update={name: str(folder.resolve() / file) for name, file in given.items() if file}
        )

    @property
    def protection(self) -> Protection:
        """Who is let in, and TLS."""
        return Protection(
            keys=self.keys,
            certificate=self.tls_certificate,
            certificate_key=self.tls_key,
            client_ca=self.client_ca,
            open_metrics=self.open_metrics,
            allow_anonymous=self.allow_anonymous,
        )

    def require_protected_on_ray(self) -> None:
        """Check that callers are known where they have to be, and that Ray Serve can do its part.

        Raises:
            AccessError: it would not be so.
        """
        self.protection.check(self.host)
        if self.client_ca:
            raise AccessError(
                "Ray Serve's proxy asks for no client certificates: use API keys, or --engine local"
            )
        if self.fast_ingress and self.tls_certificate:
            raise AccessError(
                "HAProxy as Ray Serve sets it up speaks no TLS: set fast_ingress = false, or let "
                "a proxy in front end TLS and set no tls_certificate"
            )

    @property
    def limits(self) -> Limits:
        """What the application grants its callers."""
        return Limits(
            max_body_bytes=int(self.max_body_mb * 1024 * 1024),
            num_threads=math.ceil(self.cpus_per_replica),
            max_batch_rows=self.max_batch_rows,
            model_control=self.model_control,
        )
