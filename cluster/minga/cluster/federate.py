"""From the champion through rounds on devices to the next champion.

The campaign starts from the champion's parameters and hyper-parameters; what comes out takes the
same gates and the same registry as any candidate, is promoted if it passes, and is then offered to
the devices.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from minga.cluster import pipeline
from minga.cluster.fleet import OnCampaign, campaign_plan, run_campaign
from minga.cluster.pipeline import Registered
from minga.cluster.project import Project
from minga.federation.operator import connect
from minga.federation.parameters import from_bytes
from minga.federation.trainer import Scalar
from minga.federation.v1 import federation_pb2 as pb
from minga.training.bundle import LINEAGE, MODEL, read_parameters
from minga.training.lineage import Campaign, Lineage
from minga.training.progress import OnProgress, silent
from minga.training.registry import CHAMPION


@dataclass(frozen=True, slots=True, kw_only=True)
class Federated:
    """What a campaign came to."""

    campaign: pb.Campaign
    registered: Registered
    promoted: bool
    num_devices_told: int

    @property
    def last_round(self) -> pb.Round:
        """The round whose sum the model is."""
        return [r for r in self.campaign.rounds if r.stage == pb.ROUND_STAGE_COMMITTED][-1]


def federate(
    project: Project,
    state: Path,
    *,
    on_campaign: OnCampaign,
    on_progress: OnProgress = silent,
) -> Federated:
    """Train the champion further on the fleet, judge it, promote it if it passes, publish it.

    Args:
        project: the project folder.
        state: the coordinator's state folder, or an operator's identity folder.
        on_campaign: told at each change of the campaign.
        on_progress: told of the steps around it.

    Raises:
        RegistryError: there is no champion to start from.
        CampaignError: the campaign failed or was cancelled.
    """
    registry = project.registry(on_progress)
    champion = registry.get(project.loaded_task.name, CHAMPION)
    folder = registry.fetch(champion.name, champion.version)
    lineage = Lineage.read(folder / LINEAGE)
    plan = campaign_plan(
        project.federation,
        model_name=champion.name,
        parent_version=str(champion.version),
        training=_training(project, lineage.params),
    )

    async def rounds() -> tuple[pb.Campaign, bytes]:
        async with connect(state) as operator:
            return await run_campaign(operator, plan, read_parameters(folder), on_campaign)

    campaign, model = asyncio.run(rounds())
    registered = pipeline.register_candidate(
        project,
        parameters=from_bytes(model),
        params=lineage.params,
        parent_version=champion.version,
        campaign=_campaign(campaign),
        on_progress=on_progress,
    )
    if not registered.report.blessed:
        return Federated(
            campaign=campaign, registered=registered, promoted=False, num_devices_told=0
        )
    pipeline.promote(project, registered.version)
    num_told = publish(project, state, registered.version)
    return Federated(
        campaign=campaign, registered=registered, promoted=True, num_devices_told=num_told
    )


def publish(project: Project, state: Path, which: int | str = CHAMPION) -> int:
    """Offer a registered version to the devices of the project's group.

    Returns:
        How many devices hear of it now; the others do when they connect.
    """
    registry = project.registry()
    version = registry.get(project.loaded_task.name, which)
    onnx = (registry.fetch(version.name, version.version) / MODEL).read_bytes()

    async def offer() -> int:
        async with connect(state) as operator:
            return await operator.publish_model(
                version.name, str(version.version), onnx, project.federation.group
            )

    return asyncio.run(offer())


def _training(project: Project, params: Mapping[str, Scalar]) -> dict[str, Scalar]:
    return {**params, "seed": project.seed}


def _campaign(campaign: pb.Campaign) -> Campaign:
    committed = [r for r in campaign.rounds if r.stage == pb.ROUND_STAGE_COMMITTED]
    return Campaign(
        name=campaign.campaign_id,
        rounds=len(committed),
        cohort=len(committed[-1].survivors),
        num_examples=committed[-1].total_weight,
    )
