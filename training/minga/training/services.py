"""Which version was served where and when: reads what `minga.serving.service_record` writes."""

from datetime import UTC, datetime
from typing import Any

from mlflow.utils import get_results_from_paginated_fn

from minga.training.document import Document

EXPERIMENT = "minga-serving"

_PAGE = 1000


class Service(Document):
    """One period in which one place served one version."""

    model: str
    version: str
    place: str
    """Host name and port."""
    onnx_sha256: str
    since: str
    until: str
    """Empty while it lasts; of a place that died it is when it was last seen."""
    seen_at: str
    """When the place last said that it serves this."""

    def covers(self, at: datetime) -> bool:
        """Tell whether the version was served here at a time."""
        since = datetime.fromisoformat(self.since)
        return since <= at and (not self.until or at < datetime.fromisoformat(self.until))


def services_of(client: Any, model: str = "") -> tuple[Service, ...]:
    """Give all periods, the oldest first.

    Args:
        client: of MLflow.
        model: only of this model; all if empty.
    """
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return ()
    wanted = f"tags.`minga.model` = '{model}'" if model else ""
    found = get_results_from_paginated_fn(
        lambda most, token: client.search_runs(
            [experiment.experiment_id], wanted, max_results=most, page_token=token
        ),
        _PAGE,
    )
    return tuple(sorted(map(_service, found), key=lambda one: one.since))


def _service(run: Any) -> Service:
    tags, info = run.data.tags, run.info
    return Service(
        model=tags["minga.model"],
        version=tags["minga.version"],
        place=tags["minga.place"],
        onnx_sha256=tags["minga.onnx_sha256"],
        since=_time(info.start_time),
        until=_time(info.end_time) if info.end_time else "",
        seen_at=_time(int(tags.get("minga.seen_at", info.start_time))),
    )


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds")
