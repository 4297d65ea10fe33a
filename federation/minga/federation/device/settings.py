"""How one device process is set up: `MINGA_DEVICE_*` in the environment, or flags."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from minga.federation.device.capacity import Compress
from minga.federation.limits import QUERY_MIN_COHORT
from minga.federation.secagg.sizing import MIN_COHORT
from minga.federation.trainer import Scalar
from minga.inference.access import Protection

Port = Annotated[int, Field(ge=0, le=65535)]


class DeviceSettings(BaseSettings):
    """A device's process settings; a port of 0 takes any free one."""

    model_config = SettingsConfigDict(
        env_prefix="MINGA_DEVICE_", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    folder: Path = Path("device")
    """Folder of the identity and the models, made by enrolment."""

    trainer: str = ""
    """What trains here, `package.module:attribute`; empty: the device only runs models."""

    trainer_options: dict[str, Scalar] = Field(default_factory=dict)
    """What the trainer is made with, for instance where this site's data lies."""

    allow_plain: bool = False
    """Take part in rounds whose coordinator sees this device's update. Without it the device takes
    part only where updates are masked (secure aggregation)."""

    min_noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Train only for sums in which the devices' own noise is at least so many times as long as the
    longest update, also if a tenth of them adds none; 0: with or without noise."""

    min_summed: Annotated[int, Field(ge=MIN_COHORT)] = MIN_COHORT
    """Take part only in rounds that mask updates and sum so many of them at the least, this
    device's included, also if as many are lost as the round's plan bears."""

    query_columns: tuple[str, ...] = ()
    """Columns of this site's data of which the coordinator may ask statistics, in sums over many
    devices alone. Without them no query is answered."""

    query_min_cohort: Annotated[int, Field(ge=3)] = QUERY_MIN_COHORT
    """Queries are answered only in sums over so many devices."""

    compress: Compress = "auto"
    """When models and plain updates travel as Zstandard frames: `auto` while the link is measured
    to be slower than 5 MB/s, `always` or `never`. Masked updates are random bits and go as they
    are."""

    host: str = "127.0.0.1"
    """Address of the local inference server."""

    port: Port = 8080
    """Port of the local inference server (Open Inference Protocol, and `/metrics`)."""

    keys: Path | None = None
    """The file of API keys that the local inference server wants (`minga key create --file`)."""

    tls_certificate: Path | None = None
    """The local inference server's certificate chain, PEM; both wires then speak TLS."""

    tls_key: Path | None = None
    """The certificate's private key, PEM, not encrypted."""

    client_ca: Path | None = None
    """Who signs the certificates that clients of the local inference server may show, PEM."""

    open_metrics: bool = False
    """Let `/metrics` be read without a key."""

    allow_anonymous: bool = False
    """Let the local inference server answer everyone, also beyond this machine."""

    grpc_port: Port | None = None
    """Port of the local inference server for gRPC; without one there is no gRPC."""

    @property
    def protection(self) -> Protection:
        """Whom the local inference server lets in, and its TLS."""
        return Protection(
            keys=str(self.keys or ""),
            certificate=str(self.tls_certificate or ""),
            certificate_key=str(self.tls_key or ""),
            client_ca=str(self.client_ca or ""),
            open_metrics=self.open_metrics,
            allow_anonymous=self.allow_anonymous,
        )
