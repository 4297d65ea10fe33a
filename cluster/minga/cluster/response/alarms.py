"""What is heard: one form for alarms, wherever they come from."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from minga.inference.monitor.alarms import AlarmLog

MAX_ALERTS = 1000
"""In one message of Alertmanager."""

_MAX_LABELS = 64
_Text = Annotated[str, Field(max_length=2048)]
_Labels = Annotated[dict[_Text, _Text], Field(max_length=_MAX_LABELS)]


class AlarmError(ValueError):
    """What came is no message of Alertmanager."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alarm:
    """Something that is not as it should be, or is so again.

    Attributes:
        fingerprint: names the condition; it stays the same however often it is told.
        name: of its rule.
        model: that it is about; empty if it is about none.
        version: of that model; empty if it is about all.
        summary: for people.
        since: when it began, in seconds since 1970.
        is_firing: False once it is over.
        origin: who told it: `alertmanager`, `monitor` or `registry`.
    """

    fingerprint: str
    name: str
    model: str
    version: str
    summary: str
    since: float
    is_firing: bool
    origin: str


def read_log(log: AlarmLog, model: str, after: int) -> tuple[tuple[Alarm, ...], int]:
    """Read what is new in the monitor's log.

    Args:
        log: the monitor's.
        model: whose alarms.
        after: the last record that is known.

    Returns:
        the alarms, oldest first, and the last record that is known now.

    Raises:
        MonitorError: the log cannot be read.
    """
    records = log.read(after=after, model=model)
    alarms = tuple(
        Alarm(
            fingerprint=f"monitor/{one.model}/{one.version}/{one.kind}/{one.subject}",
            name=one.kind.value,
            model=one.model,
            version=one.version,
            summary=str(one),
            since=one.since,
            is_firing=one.is_raised,
            origin="monitor",
        )
        for one in records
    )
    return alarms, records[-1].sequence if records else after


class _Alert(BaseModel):
    model_config = ConfigDict(strict=True)  # later versions of Alertmanager may tell more

    status: Literal["firing", "resolved"]
    labels: _Labels
    annotations: _Labels = {}
    starts_at: Annotated[AwareDatetime, Field(alias="startsAt")]
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{1,64}$")]


class _Webhook(BaseModel):
    model_config = ConfigDict(strict=True)

    version: Literal["4"]
    alerts: Annotated[list[_Alert], Field(max_length=MAX_ALERTS)]


def read_webhook(body: bytes) -> tuple[Alarm, ...]:
    """Read a message of Alertmanager's webhook, version 4.

    Of several alerts with one fingerprint the last one counts.

    Raises:
        AlarmError: it is none; the message names the first thing that is wrong.
    """
    try:
        webhook = _Webhook.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise AlarmError(f"{where}: {first['msg']}") from None
    alarms = {}
    for alert in webhook.alerts:
        if not alert.labels.get("alertname"):
            raise AlarmError("an alert has no label 'alertname'")
        alarms[alert.fingerprint] = Alarm(
            fingerprint=f"alertmanager/{alert.fingerprint}",
            name=alert.labels["alertname"],
            model=alert.labels.get("model", ""),
            version=alert.labels.get("version", ""),
            summary=alert.annotations.get("summary", ""),
            since=alert.starts_at.timestamp(),
            is_firing=alert.status == "firing",
            origin="alertmanager",
        )
    return tuple(alarms.values())
