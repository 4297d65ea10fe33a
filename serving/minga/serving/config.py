"""How models are served: the `[serving]` table of minga.toml."""

import math
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from minga.inference.access import Protection
from minga.inference.limits import Limits
from minga.inference.monitor.keeper import Windows


class MonitorConfig(BaseModel):
    """How what is served is watched."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    enabled: bool = True
    """Compare what models are asked and answer with what they were trained on."""

    folder: str = ""
    """Where the monitor keeps its counts, and answers to requests with an id, never rows of inputs;
    by default `.minga/monitor` in the project. On a Ray cluster of several machines, a folder that
    all of them share."""

    window_rows: int = Field(500, ge=50)
    """Rows of a version that are judged together."""

    window_s: float = Field(3600.0, gt=0)
    """A window with fewer rows is judged at this age, if it has `min_rows`."""

    min_rows: int = Field(50, ge=20)
    """Fewer rows than this are never judged."""

    flush_s: float = Field(1.0, gt=0)
    """How often each process hands over what it has counted; so much is lost if it is killed."""

    @property
    def is_on(self) -> bool:
        """Whether there is something to do, and a place for it."""
        return self.enabled and bool(self.folder)

    @property
    def path(self) -> Path:
        """The folder, absolute."""
        return Path(self.folder).absolute()

    @property
    def windows(self) -> Windows:
        """When a window is full."""
        return Windows(rows=self.window_rows, seconds=self.window_s, min_rows=self.min_rows)


Share = Annotated[float, Field(gt=0, lt=1)]


class ComparisonConfig(BaseModel):
    """How two versions of a model are compared on its traffic: `minga traffic`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    new_champions: bool = False
    """Let a new champion take over by the shares below, and only if it does no worse than the one
    before; by default it takes over at once."""

    shares: tuple[Share, ...] = Field((0.05, 0.25, 0.5), min_length=1, strict=False)
    """A canary's shares of the requests, one stage after the other; after the last it has all."""

    min_requests: int = Field(200, ge=25)
    """Requests that each version must have had until a stage of a canary ends well."""

    hold_s: float = Field(60.0, ge=0)
    """How long a stage of a canary takes at least."""

    patience_s: float = Field(3600.0, gt=0)
    """How long a canary that seems worse, but may be so by chance, is given to show the
    contrary."""

    max_error_gap: float = Field(0.01, ge=0, le=1)
    """By how much more of its requests a canary may fail than the version before."""

    max_latency_ratio: float = Field(1.5, ge=1)
    """How much slower a canary's 95th percentile may be; 2 ms more are always allowed."""

    max_drift: float = Field(0.2, gt=0)
    """How far a canary's predictions may lie from those of the version before: the population
    stability index, of which 0.2 is usually called a shift. Those of a canary that repairs the
    version before may lie as near to its own predictions on its test data instead."""

    alpha: float = Field(0.01, gt=0, lt=1)
    """The chance of finding a difference between versions that are equal: in all looks at one
    stage of a canary together, and in the one look at a split's outcomes."""

    min_outcomes: int = Field(200, ge=30)
    """Outcomes that each version of a split must have until it is said which is better."""

    key: str = Field("x-minga-key", pattern="^[a-z0-9-]+$")
    """The header, or parameter of a request, in which callers say who they are to versions that
    share the traffic: the same key always gets the same version."""


class ServingConfig(BaseModel):
    """Where and how the champion is served."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    host: str = Field("127.0.0.1", min_length=1)
    """The address to listen on. Beyond 127.0.0.1 callers must be known, by `keys` or
    `client_ca`, unless `allow_anonymous` says otherwise."""

    port: int = Field(8000, ge=0, le=65535)
    """The port to listen on; 0 takes a free one. Replicas on one machine share it: each connection
    is one replica's, and ends after half a minute or so with an answer."""

    grpc_port: int | None = Field(None, ge=0, le=65535)
    """The port to listen on for gRPC, at the same host and in the same way; 0 takes a free one, and
    without one there is no gRPC."""

    keys: str = ""
    """The file of API keys (`minga key create`); by default `.minga/keys.json`, if it is there
    when serving begins. With one, requests need a key, all but those for the server's health."""

    tls_certificate: str = ""
    """The server's certificate chain, PEM; with it and `tls_key` both wires speak TLS alone."""

    tls_key: str = ""
    """The certificate's private key, PEM, not encrypted."""

    client_ca: str = ""
    """Who signs clients' certificates, PEM. One that it signed does for a key (mutual TLS), and
    over gRPC is a must."""

    open_metrics: bool = False
    """Let `/metrics` be read without a key."""

    allow_anonymous: bool = False
    """Answer everyone who reaches the port, also beyond this machine."""

    num_replicas: int = Field(1, ge=1)
    """Processes that answer, each with all models."""

    max_replicas: int | None = Field(None, ge=1)
    """Let the number of replicas follow the load, from `num_replicas` up to this many."""

    target_ongoing_requests: float = Field(16.0, gt=0)
    """Requests that a replica should have in hand, on the mean: more of them start replicas, fewer
    end some."""

    upscale_delay_s: float = Field(10.0, gt=0)
    """How long more replicas must be wanted until they are started."""

    downscale_delay_s: float = Field(300.0, gt=0)
    """How long fewer replicas must be wanted until one is ended."""

    cpus_per_replica: float = Field(1.0, gt=0)
    """What Ray reserves for each replica; requests slower than a millisecond compute on as many
    threads, rounded up."""

    threads_per_run: int = Field(1, ge=1)
    """Threads of onnxruntime for one run of a model. 1 gives the most answers per second where
    requests come in parallel; more make a lone, large request faster."""

    model_memory_mb: float | None = Field(None, gt=0)
    """Memory that each replica's models may take together, counted by the sizes of their files.
    Models beyond are loaded when a request asks for them, and the least recently used leave; by
    default all stay."""

    max_body_mb: float = Field(32.0, gt=0)
    """The longest request body, before and after decompression."""

    max_batch_rows: int = Field(128, ge=1)
    """Rows of requests that wait at the same time are computed together, up to this many; 1 lets
    each request compute alone."""

    objective_ms: float | None = Field(None, gt=0)
    """How long a request may take in a replica. Batches are kept small enough for it, and requests
    that would take longer are refused at once (503 with Retry-After), so that under overload as
    many as can be are still answered in time. Requests faster than a millisecond are computed as
    they are read, one of each connection at a time; to refuse one would take about as long, so
    they are not refused, and their wait for each other does not count."""

    model_control: bool = False
    """Let callers load and unload models (`/v2/repository`), in all replicas at once. Where there
    are keys this takes an operator's; without keys whoever reaches the port may take a model
    away."""

    alias: str = Field("champion", min_length=1)
    """Which registered version is served: the one with this alias."""

    poll_interval_s: float = Field(1.0, gt=0)
    """How often the registry is asked whether the alias has moved."""

    rollout_timeout_s: float = Field(60.0, gt=0)
    """How long a new version may take to load on every replica."""

    comparison: ComparisonConfig = Field(
        default_factory=lambda: ComparisonConfig.model_validate({})
    )
    """How two versions of a model are compared on its traffic."""

    monitor: MonitorConfig = Field(default_factory=lambda: MonitorConfig.model_validate({}))

    def watched_in(self, folder: Path) -> Self:
        """Give the same configuration with this folder for the monitor."""
        monitor = self.monitor.model_copy(update={"folder": str(folder)})
        return self.model_copy(update={"monitor": monitor})

    @model_validator(mode="after")
    def _replicas_have_room(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(
                f"max_replicas = {self.max_replicas} must not be below "
                f"num_replicas = {self.num_replicas}"
            )
        return self

    @property
    def models(self) -> dict[str, Any]:
        """How models are kept: the arguments of `minga.inference.repository.ModelRepository`."""
        megabytes = self.model_memory_mb
        return {
            "num_threads": self.threads_per_run,
            "max_bytes": None if megabytes is None else int(megabytes * 1024 * 1024),
        }

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

    @property
    def limits(self) -> Limits:
        """What the application grants its callers."""
        return Limits(
            max_body_bytes=int(self.max_body_mb * 1024 * 1024),
            num_threads=math.ceil(self.cpus_per_replica),
            max_batch_rows=self.max_batch_rows,
            objective_s=None if self.objective_ms is None else self.objective_ms / 1000,
            model_control=self.model_control,
        )
