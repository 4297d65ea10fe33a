"""Builds Grafana's dashboard: `python -m minga.cluster.observability.dashboard` writes its JSON.

The JSON is committed, so that only who changes the dashboard needs Grafana's foundation SDK. Each
query is run by a test against a Prometheus that scraped real processes: one that finds nothing
there fails it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import (
    dashboard,
    heatmap,
    prometheus,
    stat,
    table,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FILE: Final = "grafana/dashboard.json"

Builder = timeseries.Panel | stat.Panel | table.Panel | heatmap.Panel

_SOURCE: Final = DataSourceRef(type_val="prometheus", uid="${datasource}")
_HEIGHT: Final = 8


@dataclass(frozen=True, slots=True)
class Query:
    """What a panel asks: PromQL, and how its series are called."""

    expr: str
    legend: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    Attributes:
        width: of the 24 columns of Grafana's grid.
        unit: as Grafana names it, such as `s`, `percentunit`, `Bps`.
    """

    title: str
    description: str
    queries: Sequence[Query]
    kind: type[Builder] = timeseries.Panel
    unit: str = "short"
    width: int = 8


def _quantiles(metric: str, by: str) -> tuple[Query, ...]:
    buckets = f"sum by ({by}, le) (rate({metric}_bucket[$__rate_interval]))"
    legend = " ".join(f"{{{{{name.strip()}}}}}" for name in by.split(","))
    return tuple(
        Query(f"histogram_quantile({q}, {buckets})", f"{legend} p{100 * q:g}") for q in (0.5, 0.95)
    )


SERVING: Final = (
    Panel(
        "Servers that answer",
        "Central servers whose /metrics can be scraped.",
        [Query('sum(up{job="minga-serving"})')],
        stat.Panel,
        width=4,
    ),
    Panel(
        "Alerts firing",
        "Of Minga's own rules.",
        [Query('count(ALERTS{alertname=~"Minga.+",alertstate="firing"}) or vector(0)')],
        stat.Panel,
        width=4,
    ),
    Panel(
        "Versions that answer",
        "Which version of which model, on servers and on devices.",
        [Query('count by (job, model, version) (minga_inference_model_info{model=~"$model"})')],
        table.Panel,
    ),
    Panel(
        "Requests",
        "Inference requests per second.",
        [Query('model:minga_inference_requests:rate5m{model=~"$model"}', "{{job}} {{model}}")],
        unit="reqps",
    ),
    Panel(
        "Failed and turned away",
        "Share of requests that the server failed (500 and above), and that it had no room for.",
        [
            Query('model:minga_inference_errors:ratio_rate5m{model=~"$model"}', "{{model}} failed"),
            Query('model:minga_inference_shed:ratio_rate5m{model=~"$model"}', "{{model}} shed"),
        ],
        unit="percentunit",
    ),
    Panel(
        "Time of a request",
        "From its first byte to the answer; half of the requests, and all but one in a hundred.",
        [
            Query('model:minga_inference_request_seconds:p50_5m{model=~"$model"}', "{{model}} p50"),
            Query('model:minga_inference_request_seconds:p99_5m{model=~"$model"}', "{{model}} p99"),
        ],
        unit="s",
    ),
    Panel(
        "Answers by status",
        "What callers got; a refusal of the caller's own mistake is 4xx.",
        [
            Query(
                "sum by (status) (rate(minga_inference_requests_total[$__rate_interval]))",
                "{{status}}",
            )
        ],
        unit="reqps",
    ),
    Panel(
        "How times are spread",
        "Requests by the time that they took.",
        [
            Query(
                "sum by (le) (increase("
                'minga_inference_request_seconds_bucket{model=~"$model"}[$__rate_interval]))',
                "{{le}}",
            )
        ],
        heatmap.Panel,
        unit="s",
        width=16,
    ),
    Panel(
        "Under way",
        "Requests that have begun and not ended.",
        [Query("sum by (job, instance) (minga_inference_requests_in_progress)", "{{instance}}")],
    ),
)

MODELS: Final = (
    Panel(
        "Standing alarms",
        "What the monitor has found in two windows in a row, and not cleared since.",
        [Query("count(minga_monitor_standing_alarm) or vector(0)")],
        stat.Panel,
    ),
    Panel(
        "Performance, estimated",
        "Measures of the newest window without labels (CBPE), beside those of the test split.",
        [
            Query(
                "max by (model, version, metric)"
                ' (minga_monitor_estimated_performance{model=~"$model"})',
                "{{model}} {{version}} {{metric}}",
            ),
            Query(
                "max by (model, version, metric)"
                ' (minga_monitor_reference_performance{model=~"$model"})',
                "{{model}} {{version}} {{metric}}, test split",
            ),
        ],
    ),
    Panel(
        "Drift by column",
        "Population stability index of the newest window.",
        [
            Query(
                "max by (model, version, column)"
                ' (minga_monitor_drift{statistic="psi",model=~"$model"})',
                "{{model}} {{version}} {{column}}",
            )
        ],
    ),
    Panel(
        "Far from the training data",
        "Share of rows that are outliers as a whole.",
        [
            Query(
                'max by (model, version) (minga_monitor_outlier_share{model=~"$model"})',
                "{{model}} {{version}}",
            )
        ],
        unit="percentunit",
    ),
    Panel(
        "Windows",
        "Windows of traffic that were judged.",
        [
            Query(
                'max by (model, version) (minga_monitor_windows_total{model=~"$model"})',
                "{{model}} {{version}}",
            )
        ],
    ),
)

FLEET: Final = (
    Panel(
        "Devices",
        "Enrolled, and with an open control stream.",
        [
            Query("sum(minga_coordinator_enrolled_devices)", "enrolled"),
            Query("sum(minga_coordinator_connected_devices)", "connected"),
        ],
    ),
    Panel(
        "Rounds",
        "Rounds of the last hour, by how they ended.",
        [Query("sum by (result) (increase(minga_coordinator_rounds_total[1h]))", "{{result}}")],
    ),
    Panel(
        "Time of a round",
        "From invitation to commit.",
        _quantiles("minga_coordinator_round_duration_seconds", "job"),
        unit="s",
    ),
    Panel(
        "Bytes of rounds",
        "What rounds move, seen from the coordinator.",
        [
            Query(
                "sum by (direction) (rate(minga_coordinator_round_bytes_total[$__rate_interval]))",
                "{{direction}}",
            )
        ],
        unit="Bps",
    ),
    Panel(
        "Lost and refused",
        "Devices that were invited and are not in the sum, and messages that were refused, "
        "in the last hour.",
        [
            Query("sum(increase(minga_coordinator_lost_devices_total[1h]))", "lost devices"),
            Query("sum(increase(minga_coordinator_refused_messages_total[1h]))", "refused"),
        ],
    ),
    Panel(
        "Privacy spent",
        "Share of the fleet's privacy budget; it never refills.",
        [Query("instance:minga_coordinator_privacy_spent:ratio", "{{instance}}")],
        unit="percentunit",
    ),
)

DEVICES: Final = (
    Panel(
        "Connected by their own account",
        "1 while a device's control stream is open.",
        [Query("minga_device_connected", "{{instance}}")],
    ),
    Panel(
        "Models on devices",
        "How many devices run which version.",
        [Query("count by (name, version) (minga_device_model_info)", "{{name}} {{version}}")],
    ),
    Panel(
        "Training on devices",
        "Time of local training in a round.",
        _quantiles("minga_device_training_seconds", "job"),
        unit="s",
    ),
    Panel(
        "Links",
        "What devices' links carried in their newest transfers.",
        [Query("minga_device_link_bytes_per_second", "{{instance}} {{way}}")],
        unit="Bps",
    ),
    Panel(
        "Bytes on the wire",
        "What models and updates take on the link, and unpacked.",
        [
            Query("sum by (way) (minga_device_blob_wire_bytes_total)", "{{way}} on the link"),
            Query("sum by (way) (minga_device_blob_content_bytes_total)", "{{way}} unpacked"),
        ],
        unit="bytes",
    ),
    Panel(
        "Certificates",
        "Time that is left; they renew by themselves after two thirds of theirs.",
        [
            Query("min(minga_device_certificate_end_timestamp_seconds) - time()", "first device"),
            Query("min(minga_coordinator_certificate_end_timestamp_seconds) - time()", "ports"),
            Query("min(minga_coordinator_authority_end_timestamp_seconds) - time()", "authority"),
        ],
        unit="s",
    ),
)

RESPONSES: Final = (
    Panel(
        "Cases",
        "What alarms led to, by how it ended.",
        [Query("sum by (end) (minga_respond_cases)", "{{end}}")],
    ),
    Panel(
        "Alarms that may act",
        "Those that are not over, and what is left of the budget for cases.",
        [
            Query("sum(minga_respond_firing_alarms)", "firing"),
            Query("sum(minga_respond_cases_left)", "cases left"),
        ],
    ),
    Panel(
        "Waits for a person",
        "1 while a case waits for an approval.",
        [Query("max(minga_respond_awaits_approval)", "waits")],
    ),
)

ROWS: Final = {
    "Serving": SERVING,
    "Models": MODELS,
    "Fleet": FLEET,
    "Devices": DEVICES,
    "Responses": RESPONSES,
}


def build() -> str:
    """Give the dashboard as JSON."""
    board = (
        dashboard.Dashboard("Minga")
        .uid("minga")
        .description("Serving, fleet and devices. Written by Minga; `minga observe` ships it.")
        .tags(["minga"])
        .time("now-6h", "now")
        .refresh("30s")
        .timezone("browser")
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .datasource(_SOURCE)
            .query("label_values(minga_inference_model_info, model)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .multi(multi=True)
            .include_all(include_all=True)
            .all_value(".*")
        )
    )
    for title, panels in ROWS.items():
        board = board.with_row(dashboard.Row(title))
        for panel in panels:
            board = board.with_panel(_drawn(panel))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _drawn(panel: Panel) -> Builder:
    drawn = (
        panel.kind()
        .title(panel.title)
        .description(panel.description)
        .datasource(_SOURCE)
        .unit(panel.unit)
        .height(_HEIGHT)
        .span(panel.width)
    )
    for index, query in enumerate(panel.queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id(chr(ord("A") + index))
        target = target.legend_format(query.legend) if query.legend else target
        if panel.kind is table.Panel:
            target = target.instant().format(PromQueryFormat.TABLE)
        elif panel.kind is heatmap.Panel:
            target = target.range().format(PromQueryFormat.HEATMAP)
        else:
            target = target.range()
        drawn = drawn.with_target(target)
    return drawn


def main() -> None:
    """Write the JSON into this package."""
    Path(str(files(__package__) / FILE)).write_text(build(), encoding="utf-8")


if __name__ == "__main__":
    main()
