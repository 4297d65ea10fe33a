"""How one coordinator process is set up: `MINGA_COORDINATOR_*` in the environment, or flags."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from minga.federation.coordinator.authority import Lifetimes
from minga.federation.limits import (
    CALLS_PER_S,
    ENROLMENTS_PER_S,
    HEARTBEAT_INTERVAL_S,
    MAX_CONNECTIONS,
    MESSAGES_PER_S,
    MIN_HEARTBEAT_INTERVAL_S,
    RECONNECT_GRACE_S,
    RECONNECTS_PER_S,
)

Port = Annotated[int, Field(ge=0, le=65535)]


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Hours = Annotated[float, Field(ge=1, le=87600)]


class CoordinatorSettings(BaseSettings):
    """The coordinator's process settings; a port of 0 takes any free one."""

    model_config = SettingsConfigDict(
        env_prefix="MINGA_COORDINATOR_", extra="forbid", frozen=True, use_attribute_docstrings=True
    )

    state: Path = Path("coordinator")
    """Folder of everything that must survive: database, authority, blobs."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    public_host: str = ""
    """Name or address under which devices dial; empty: the address listened on."""

    port: Port = 7443
    """Port of enrolled devices and operators (mutual TLS)."""

    enrol_port: Port = 7444
    """Port where tokens are redeemed (server TLS)."""

    metrics_port: Port = 9464
    """Port of the Prometheus endpoint."""

    reconnect_grace_s: Annotated[float, Field(ge=0)] = RECONNECT_GRACE_S
    """How long a device may be away during a round before it counts as lost."""

    heartbeat_interval_s: Annotated[float, Field(ge=MIN_HEARTBEAT_INTERVAL_S)] = (
        HEARTBEAT_INTERVAL_S
    )
    """How often devices say that they are alive; three times that in silence ends a stream."""

    reconnects_per_s: Annotated[float, Field(gt=0)] = RECONNECTS_PER_S
    """How many devices may dial again in a second: after a restart a fleet spreads out so far."""

    enrolments_per_s: Rate = ENROLMENTS_PER_S
    """Enrolments that one address may ask for in a second; all together four times that."""

    calls_per_s: Rate = CALLS_PER_S
    """Calls that one device may make in a second."""

    messages_per_s: Rate = MESSAGES_PER_S
    """Messages that one device may send on its control stream in a second."""

    max_connections: Annotated[int, Field(ge=1)] = MAX_CONNECTIONS
    """Connections that are held on the device port; further ones are closed at once."""

    strategies: tuple[str, ...] = ()
    """Strategies written for Flower that campaigns may name beside Flower's own, each as
    `package.module:attribute`: this coordinator imports and runs them."""

    device_certificate_hours: Hours = 720
    """How long a device's certificate holds; it is renewed after two thirds of that."""

    operator_certificate_hours: Hours = 720
    """How long the certificate in `operator/` holds; a copy is good for a quarter of that."""

    server_certificate_hours: Hours = 2160
    """How long the coordinator's own certificate holds; it is replaced after two thirds of that."""

    unmasking: Literal["threads", "ray"] = "threads"
    """What takes masks off a round's sum: threads of the coordinator, or actors on Ray (the cluster
    that RAY_ADDRESS names, or one that is started on this machine)."""

    @property
    def dial_host(self) -> str:
        """The host that tokens name."""
        return self.public_host or self.host

    @property
    def lifetimes(self) -> Lifetimes:
        """How long certificates hold."""
        return Lifetimes(
            device=timedelta(hours=self.device_certificate_hours),
            operator=timedelta(hours=self.operator_certificate_hours),
            server=timedelta(hours=self.server_certificate_hours),
        )
