"""From the champion through rounds on devices to the next champion.

The campaign starts from the champion's parameters and hyper-parameters; what comes out takes the
same gates and the same registry as any candidate, is promoted if it passes, and is then offered to
the devices.
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from minga.cluster import pipeline
from minga.cluster.checking import require_valid_data
from minga.cluster.fleet import OnCampaign, committed, follow_campaign
from minga.cluster.pipeline import Registered
from minga.cluster.project import Project
from minga.cluster.runs import campaign_run
from minga.federation.errors import CampaignError
from minga.federation.flower.arrays import FLOWER_ARRAYS, names_to_text
from minga.federation.operator import Operator, connect
from minga.federation.parameters import Parameters, to_bytes
from minga.federation.parts import split_personal
from minga.federation.planning import campaign_plan
from minga.federation.trainer import Scalar
from minga.federation.v1 import federation_pb2 as pb
from minga.training.bundle import LINEAGE, MODEL, read_parameters
from minga.training.lineage import Campaign, Lineage
from minga.training.network import build_network, model_names, parameters_of
from minga.training.progress import OnProgress, silent
from minga.training.registry import CHAMPION, Registry, Version


@dataclass(frozen=True, slots=True, kw_only=True)
class Federated:
    """What a campaign came to."""

    campaign: pb.Campaign
    registered: Registered
    promoted: bool
    num_devices_told: int

    @property
    def evaluations(self) -> list[pb.Round]:
        """The rounds in which devices measured the model, oldest first."""
        return committed(self.campaign, pb.ROUND_WORK_EVALUATION)


def federate(
    project: Project,
    state: Path,
    *,
    on_campaign: OnCampaign,
    on_progress: OnProgress = silent,
    campaign_id: str = "",
) -> Federated:
    """Train the champion further on the fleet, judge it, promote it if it passes, publish it.

    Args:
        project: the project folder.
        state: the coordinator's state folder, or an operator's identity folder.
        on_campaign: told at each change of the campaign.
        on_progress: told of the steps around it.
        campaign_id: follow this campaign, started earlier, instead of starting one.

    Rounds are in MLflow and TensorBoard while it goes on, in the run that the version will have.

    Raises:
        RegistryError: there is no champion to start from.
        CampaignError: the campaign failed or was cancelled, or is of another model.
        SchemaError: the project's own data, which judges the product, breaks its schema; the
            campaign's model is kept by the coordinator.
    """
    registry = project.registry(on_progress)

    async def rounds() -> tuple[str, pb.Campaign, Parameters]:
        async with connect(state) as operator:
            followed = campaign_id or await start(operator, project, registry)
            if campaign_id and pipeline.find_registered(project, campaign=campaign_id):
                return "", *await follow_campaign(operator, campaign_id, on_campaign)
            with campaign_run(project, followed, on_progress) as (run_id, note):

                def told(campaign: pb.Campaign) -> None:
                    _require_own(project, campaign)
                    on_campaign(campaign)
                    note(campaign)

                return run_id, *await follow_campaign(operator, followed, told)

    run_id, campaign, model = asyncio.run(rounds())
    registered = take_in(project, campaign, model, on_progress, run_id=run_id)
    if not pipeline.promote_if_allowed(project, registered):
        return Federated(
            campaign=campaign, registered=registered, promoted=False, num_devices_told=0
        )
    num_told = publish(project, state, registered.version)
    return Federated(
        campaign=campaign, registered=registered, promoted=True, num_devices_told=num_told
    )


def take_in(
    project: Project,
    campaign: pb.Campaign,
    model: Parameters,
    on_progress: OnProgress = silent,
    *,
    run_id: str = "",
) -> Registered:
    """Judge and register what a campaign came to, unless that was done already.

    Args:
        project: whose campaign it was.
        campaign: as it ended.
        model: its last global model.
        on_progress: told of the steps.
        run_id: of the run that recorded it; without one a run is made.

    Raises:
        CampaignError: it is of another model than the project's.
        SchemaError: the project's data breaks its schema.
    """
    _require_own(project, campaign)
    name, registry = project.loaded_task.name, project.registry(on_progress)
    found = pipeline.find_registered(project, campaign=campaign.campaign_id)
    if found is not None:
        return found
    require_valid_data(project)
    run_id = run_id or _recorded(project, campaign, on_progress)
    parent = registry.get(name, campaign.plan.parent_version)
    params = params_of(registry, parent)
    project.tracker().log(run_id, params=params)
    return pipeline.register_candidate(
        project,
        parameters=pipeline.finish(
            project, {**personal_of(registry, parent, campaign), **model}, params
        ),
        params=params,
        run_id=run_id,
        parent_version=parent.version,
        campaign=_campaign(campaign),
        on_progress=on_progress,
    )


def _recorded(project: Project, campaign: pb.Campaign, on_progress: OnProgress) -> str:
    """Make the run of a campaign that has ended, and give its id."""
    with campaign_run(project, campaign.campaign_id, on_progress) as (run_id, note):
        note(campaign)
    return run_id


def _require_own(project: Project, campaign: pb.Campaign) -> None:
    """Refuse a campaign of another model than the project's."""
    name = project.loaded_task.name
    if campaign.plan.model_name != name:
        raise CampaignError(
            f"campaign {campaign.campaign_id} trained {campaign.plan.model_name!r}, this project's "
            f"model is {name!r}; go to the project that started it"
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


async def start(operator: Operator, project: Project, registry: Registry) -> str:
    """Start a campaign from the champion; gives its name.

    Raises:
        RegistryError: there is no champion to start from.
        CampaignError: another one is running, or the plan cannot work.
    """
    champion = registry.get(project.loaded_task.name, CHAMPION)
    params = params_of(registry, champion)
    plan = campaign_plan(
        project.federation,
        model_name=champion.name,
        parent_version=str(champion.version),
        training={**params, "seed": project.seed, **_flower_arrays(project, params)},
        metrics=("loss", project.loaded_task.objective.metric),
    )
    start = read_parameters(registry.fetch(champion.name, champion.version))
    shared, _ = split_personal(start, plan.personal)
    return await operator.start_campaign(plan, to_bytes(shared))


def personal_of(registry: Registry, parent: Version, campaign: pb.Campaign) -> Parameters:
    """Give the tensors that did not travel: in the centre they stay the parent's."""
    if not campaign.plan.personal:
        return {}
    before = read_parameters(registry.fetch(parent.name, parent.version))
    return split_personal(before, campaign.plan.personal)[1]


def _flower_arrays(project: Project, params: dict[str, Scalar]) -> dict[str, Scalar]:
    """Say which parameters Flower's apps and strategies see, in the order of the network.

    An app knows the model alone; a strategy sees all that devices train.
    """
    flower = project.federation.flower
    if not flower.client_app and not flower.strategy:
        return {}
    network = build_network(project.loaded_task, params, project.splits.train, seed=project.seed)
    names = model_names(network) if flower.client_app else {n: n for n in parameters_of(network)}
    return {FLOWER_ARRAYS: names_to_text(names)}


def params_of(registry: Registry, version: Version) -> dict[str, Scalar]:
    """Read the hyper-parameters that a version's network is built with."""
    folder = registry.fetch(version.name, version.version)
    return dict(Lineage.read(folder / LINEAGE).params)


def _campaign(campaign: pb.Campaign) -> Campaign:
    rounds = committed(campaign)
    evaluations = committed(campaign, pb.ROUND_WORK_EVALUATION)
    return Campaign(
        name=campaign.campaign_id,
        rounds=len(rounds),
        cohort=len(rounds[-1].survivors),
        # With control variates each device counts as one, whatever it has.
        num_examples=0 if campaign.plan.scaffold else rounds[-1].total_weight,
        evaluations={r.number: dict(r.metrics) for r in evaluations},
    )
