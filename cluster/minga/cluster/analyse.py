"""Statistics of the fleet's data, asked for by sums over many devices."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minga.cluster.fleet import OnCampaign, committed
from minga.cluster.project import Project
from minga.federation import wire
from minga.federation.analytics import ColumnQuery, ColumnStatistics, Query
from minga.federation.errors import CampaignError, PeerError
from minga.federation.operator import connect
from minga.federation.planning import campaign_plan
from minga.federation.v1 import federation_pb2 as pb


def query_of(columns: Sequence[str], num_bins: int, quantiles: Sequence[float]) -> Query:
    """Read columns as they are written on the command line.

    Args:
        columns: `NAME:LOW:HIGH` each; values are clipped to these bounds.
        num_bins: of equal width between the bounds; 0: no histogram.
        quantiles: from 0 to 1.

    Raises:
        CampaignError: it is written otherwise, or asks for what cannot be answered.
    """
    return Query(columns=tuple(_column(text, num_bins, quantiles) for text in columns))


def _column(text: str, num_bins: int, quantiles: Sequence[float]) -> ColumnQuery:
    try:
        name, low, high = text.rsplit(":", 2)
        edges = np.linspace(float(low), float(high), num_bins + 1) if num_bins > 0 else ()
        return ColumnQuery(
            column=name,
            low=float(low),
            high=float(high),
            edges=tuple(float(edge) for edge in edges),
            quantiles=tuple(quantiles),
        )
    except (ValueError, PeerError) as error:
        raise CampaignError(
            f"{text!r} cannot be asked about: {error}; write NAME:LOW:HIGH, as temperature:0:120"
        ) from error


def analyse(
    project: Project, state: Path, query: Query, *, on_campaign: OnCampaign
) -> tuple[pb.Campaign, tuple[ColumnStatistics, ...]]:
    """Find out what a query asks, over the devices of the project's `[federation]` table.

    Raises:
        CampaignError: too few devices answer, or the coordinator refuses.
    """
    settings = project.federation.model_copy(
        update={"personal": (), "scaffold": False, "protection": "secure"}
    )
    plan = campaign_plan(
        settings, model_name=project.loaded_task.name, parent_version="", training={}
    )
    for field in ("evaluation", "buffer", "flower_strategy", "server_optimizer"):
        plan.ClearField(field)
    plan.query.CopyFrom(wire.query_to_wire(query))
    plan.num_rounds, plan.num_groups = query.num_rounds, 1

    async def run() -> pb.Campaign:
        campaign = pb.Campaign()
        async with connect(state) as operator:
            async for campaign in operator.watch(await operator.start_query(plan)):
                on_campaign(campaign)
        return campaign

    campaign = asyncio.run(run())
    if campaign.state != pb.CAMPAIGN_STATE_COMPLETED:
        raise CampaignError(f"the devices did not answer: {campaign.reason}")
    answers = [list(round_.answer) for round_ in committed(campaign, pb.ROUND_WORK_QUERY)]
    return campaign, query.statistics(answers)
