"""The fleet as operators see it: devices, campaigns, models, as plain values."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from minga.federation.errors import CampaignError
from minga.federation.operator import Operator, connect
from minga.federation.parameters import Parameters, from_bytes
from minga.federation.parts import split_control
from minga.federation.v1 import federation_pb2 as pb
from minga.training.progress import OnProgress, Progress

OnCampaign = Callable[[pb.Campaign], None]


async def describe_devices(state: Path, group: str = "") -> list[dict[str, Any]]:
    """Give the enrolled devices as JSON-ready rows."""
    async with connect(state) as operator:
        return [_device(device) for device in await operator.devices(group)]


def _device(device: pb.Device) -> dict[str, Any]:
    state = "revoked" if device.revoked else "connected" if device.connected else "away"
    model = device.model if device.HasField("model") else pb.ModelReport()
    return {
        "device": device.device_id,
        "group": device.group,
        "state": state,
        "trains": device.trains,
        "model": model.name,
        "model_version": model.version,
        "model_sha256": model.digest.hex(),
        "model_state": pb.ModelState.Name(model.state).removeprefix("MODEL_STATE_").lower(),
        "model_detail": model.detail,
        "rounds_counted": device.rounds_counted,
        "agent_version": device.agent_version,
        "condition": _condition(device) if device.HasField("condition") else None,
        "enrolled_at": _time(device.enrolled_at),
        "last_seen_at": _time(device.last_seen_at) if device.HasField("last_seen_at") else None,
    }


def _condition(device: pb.Device) -> dict[str, Any]:
    return {
        "on_mains": device.condition.on_mains,
        "idle_cpu": round(device.condition.idle_cpu, 3),
        "free_memory_bytes": device.condition.free_memory_bytes,
    }


def _privacy(campaign: pb.Campaign) -> dict[str, float] | None:
    """Say what was spent after the newest round, and the bound it left; None without noise."""
    if not campaign.plan.HasField("privacy"):
        return None
    notes = [round_.privacy for round_ in campaign.rounds if round_.HasField("privacy")]
    return {
        "epsilon": notes[-1].epsilon if notes else 0.0,
        "delta": campaign.plan.privacy.delta,
        "budget": campaign.plan.privacy.epsilon,
        "max_norm": notes[-1].max_norm if notes else campaign.plan.privacy.max_norm,
    }


def privacy_note(privacy: Mapping[str, float] | None) -> str:
    """Write what was spent of the budget, and how long updates may be; nothing without noise."""
    if privacy is None:
        return ""
    return (
        f"epsilon {privacy['epsilon']:.3g} of {privacy['budget']:.3g} spent "
        f"at delta {privacy['delta']:.3g}, updates up to {privacy['max_norm']:.3g} long"
    )


def _time(moment: Timestamp) -> str:
    return moment.ToDatetime().strftime("%Y-%m-%d %H:%M:%S UTC")


def describe_campaign(campaign: pb.Campaign) -> dict[str, Any]:
    """Give a campaign as a JSON-ready value."""
    return {
        "campaign": campaign.campaign_id,
        "model": campaign.plan.model_name,
        "parent_version": campaign.plan.parent_version,
        "state": pb.CampaignState.Name(campaign.state).removeprefix("CAMPAIGN_STATE_").lower(),
        "reason": campaign.reason,
        "num_rounds": campaign.plan.num_rounds,
        "privacy": _privacy(campaign),
        "rounds": [_round(round_) for round_ in campaign.rounds],
    }


def _round(round_: pb.Round) -> dict[str, Any]:
    return {
        "round": round_.round_id,
        "number": round_.number,
        "stage": pb.RoundStage.Name(round_.stage).removeprefix("ROUND_STAGE_").lower(),
        "invited": list(round_.invited),
        "survivors": list(round_.survivors),
        "lost": dict(round_.lost),
        "total_weight": round_.total_weight,
        "bytes_received": round_.bytes_received,
        "bytes_sent": round_.bytes_sent,
        "reason": round_.reason,
        "work": pb.RoundWork.Name(round_.work or pb.ROUND_WORK_TRAINING)
        .removeprefix("ROUND_WORK_")
        .lower(),
        "metrics": dict(round_.metrics),
    }


def committed(
    campaign: pb.Campaign, work: "pb.RoundWork.ValueType" = pb.ROUND_WORK_TRAINING
) -> list[pb.Round]:
    """Give the rounds of one kind that came to something, oldest first."""
    return [
        round_
        for round_ in campaign.rounds
        if round_.stage == pb.ROUND_STAGE_COMMITTED
        and (round_.work or pb.ROUND_WORK_TRAINING) == work
    ]


def report_campaign(on_progress: OnProgress, step: str = "federate") -> OnCampaign:
    """Turn a campaign's states into progress: rounds done, and the stage of the open one."""

    def watch(campaign: pb.Campaign) -> None:
        done = len(committed(campaign)) + len(committed(campaign, pb.ROUND_WORK_QUERY))
        note = campaign.reason
        if campaign.rounds and not note:
            newest = campaign.rounds[-1]
            stage = pb.RoundStage.Name(newest.stage).removeprefix("ROUND_STAGE_").lower()
            parts = [f"{len(newest.survivors)} updates", privacy_note(_privacy(campaign))]
            note = f"round {newest.number}: {stage}, {', '.join(filter(None, parts))}"
        on_progress(Progress(step=step, done=done, total=campaign.plan.num_rounds, note=note))

    return watch


async def follow_campaign(
    operator: Operator, campaign_id: str, on_campaign: OnCampaign
) -> tuple[pb.Campaign, Parameters]:
    """Follow a campaign to its end, whoever started it.

    Args:
        operator: the connection to the coordinator.
        campaign_id: which campaign.
        on_campaign: told of its state now and at each change.

    Returns:
        The campaign as it ended, and its last global model.

    Raises:
        CampaignError: there is no such campaign, it failed, or it was cancelled.
    """
    campaign = pb.Campaign()
    async for campaign in operator.watch(campaign_id):
        on_campaign(campaign)
    if campaign.state != pb.CAMPAIGN_STATE_COMPLETED:
        raise CampaignError(
            f"campaign {campaign_id} did not complete: {campaign.reason}. "
            "Rounds that were committed stay; see `minga status`"
        )
    model, _ = split_control(from_bytes(await operator.read(campaign.model_digest)))
    return campaign, model
