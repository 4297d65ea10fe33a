"""`minga analyse`: statistics of the fleet's data."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minga.cli.output import print_json, print_line, print_table, show_progress

if TYPE_CHECKING:
    from minga.federation.analytics import ColumnStatistics


def analyse(
    column: str,
    /,
    *others: str,
    project: Path = Path(),
    state: Path = Path("coordinator"),
    bins: int = 0,
    quantile: tuple[float, ...] = (),
    json: bool = False,
) -> None:
    """Ask the fleet for means, variances, histograms and quantiles of its data, by sums alone.

    Each column is written NAME:LOW:HIGH; values are clipped to these bounds. Devices answer only
    about columns that their owners allow (`minga device run --allow-query NAME`), under secure
    aggregation, in sums over at least five devices. The `[federation]` table says how many are
    asked.

    Example: minga analyse temperature:0:120 load:0:1 --bins 10 --quantile 0.5

    Args:
        column: The first column.
        others: More columns.
        project: The project folder.
        state: The coordinator's state folder, or an operator's identity folder.
        bins: Bins of a histogram between the bounds; 0 asks for none.
        quantile: From 0 to 1; may be given several times. Quantiles take three more rounds.
        json: Print JSON.
    """
    from minga.cluster.analyse import analyse as run
    from minga.cluster.analyse import query_of
    from minga.cluster.fleet import committed, report_campaign
    from minga.cluster.project import load
    from minga.federation.v1 import federation_pb2 as pb

    query = query_of((column, *others), bins, quantile)
    with show_progress() as show:
        watch = report_campaign(show, "analyse")
        campaign, found = run(load(project), state, query, on_campaign=watch)
    rounds = committed(campaign, pb.ROUND_WORK_QUERY)
    if json:
        print_json(
            {
                "campaign": campaign.campaign_id,
                "num_devices": len(rounds[0].survivors),
                "num_rows": rounds[0].total_weight,
                "columns": [_printable(statistics) for statistics in found],
            }
        )
        return
    print_table(
        ("column", "present", "mean", "deviation", *(f"q {q:g}" for q in quantile)),
        [
            (
                s.column,
                f"{s.share_present:.1%}",
                f"{s.mean:.6g}",
                f"{s.variance**0.5:.6g}",
                *(f"{s.quantiles[q]:.6g}" for q in quantile),
            )
            for s in found
        ],
    )
    for asked, statistics in zip(query.columns, found, strict=True):
        for low, high, share in zip(
            asked.edges, asked.edges[1:], statistics.histogram[1:], strict=False
        ):
            print_line(f"{asked.column} {low:.6g} to {high:.6g}: {share:.2%}")
    devices, rows = len(rounds[0].survivors), rounds[0].total_weight
    print_line(f"over {rows} rows on {devices} devices")


def _printable(statistics: "ColumnStatistics") -> dict[str, Any]:
    """Give statistics with keys that JSON can have."""
    quantiles = {f"{q:g}": value for q, value in statistics.quantiles.items()}
    return {**asdict(statistics), "quantiles": quantiles}
