"""What alarms may do: the `[respond]` table of minga.toml."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from minga.inference.uris import redacted

Seconds = Annotated[float, Field(ge=0)]


class RespondConfig(BaseModel):
    """Which alarms act, how, and how often."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    alarms: Annotated[tuple[str, ...], Field(strict=False)] = (
        "estimated-performance",
        "performance",
        "concept-drift",
    )
    """The alarms that act: kinds of the monitor's, names of Alertmanager's, and `stale`, which is
    raised when the champion is what `minga model stale` calls old or worn ([gates] max_age_days,
    max_rows). Others are not kept. An alarm that names another model than the project's does not
    act. By default a model that has become worse acts; that its inputs have drifted need not
    hurt."""

    action: Literal["retrain", "federate"] = "retrain"
    """retrain: train centrally with the champion's hyper-parameters, on `source`. federate: start a
    campaign as `[federation]` says; devices train on what they have by then."""

    source: str = ""
    """What `Task.data` gets when an alarm trains anew; by default what `[data] source` says, read
    again. `{since}` and `{until}` stand for when the alarm began and when its case was opened, as
    2026-11-23T14:00:00Z. `stale` began when the champion was made."""

    weights: Literal["new", "champion"] = "new"
    """new: train from the beginning. champion: train the champion's weights further, which keeps
    what earlier data taught, and the preparation of inputs as it was fitted then; what is no
    network is fitted anew in any case."""

    coordinator: str = ""
    """The coordinator's state folder, or an operator's identity folder: needed for campaigns, and
    for devices to be offered what is promoted. A relative path is taken from the project folder."""

    approval: Literal["none", "start", "promotion"] = "none"
    """What waits for `minga respond approve`: nothing, the start of the work, or the promotion of a
    version that passed its gates."""

    approval_days: Annotated[float, Field(gt=0)] = 14.0
    """How long a case waits for the approvals that [gates] approvals asks for, before it ends as
    expired."""

    rollout: Literal["at once", "canary"] = "at once"
    """at once: a version that passed its gates is promoted. canary: it takes growing shares of the
    traffic first, as `[serving.comparison]` says, and is promoted if that ends well. A repair
    answers otherwise than what it repairs: its predictions may lie near the champion's, or near its
    own on its test data. Where `new_champions` is set there it is a canary in any case."""

    cooldown_s: Seconds = 6 * 3600.0
    """How long after the end of a case no other one is opened."""

    max_cases: Annotated[int, Field(ge=1)] = 3
    """Cases in `period_days`, at most; what is heard beyond waits."""

    period_days: Annotated[float, Field(gt=0)] = 7.0
    """The time in which `max_cases` counts."""

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """The address where Alertmanager's webhook is received. It is plain HTTP: beyond 127.0.0.1 let
    a proxy speak TLS, or the token can be read on the way."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8070
    """Its port; 0 takes a free one."""

    @field_serializer("source")
    def _without_secrets(self, source: str) -> str:
        """Settings are kept with every run; a password is not."""
        return redacted(source)

    @model_validator(mode="after")
    def _require_coordinator(self) -> Self:
        if self.action == "federate" and not self.coordinator:
            raise ValueError("action = 'federate' needs coordinator, its state folder")
        return self
