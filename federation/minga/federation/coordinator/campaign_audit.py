"""What the audit log says of campaigns and rounds: of honest devices numbers, not names."""

from minga.federation.coordinator.audit_log import AuditLog, Kind
from minga.federation.coordinator.campaign import Campaign
from minga.federation.coordinator.rounds import SumComputed
from minga.federation.v1 import federation_pb2 as pb


def campaign_started(audit: AuditLog, campaign: Campaign, by: str) -> None:
    """Tell of a campaign that begins, and of what is special in it.

    That is the strategy whose code it runs here, and the columns of data that it asks about.
    """
    plan = campaign.plan
    strategy = plan.flower_strategy.reference
    query = ",".join(column.column for column in plan.query.columns)
    audit.append(
        Kind.CAMPAIGN_STARTED,
        f"campaign/{campaign.campaign_id}",
        by=by,
        model=plan.model_name,
        model_digest=plan.model_digest.hex(),
        num_rounds=plan.num_rounds,
        group=plan.group,
        cohort=plan.cohort,
        min_cohort=plan.min_cohort,
        **({"strategy": strategy} if strategy else {}),
        **({"query": query} if query else {}),
    )


def campaign_ended(audit: AuditLog, campaign: Campaign, state: int, reason: str, by: str) -> None:
    """Tell of a campaign that completed, failed, or was cancelled by somebody."""
    subject = f"campaign/{campaign.campaign_id}"
    if state == pb.CAMPAIGN_STATE_CANCELLED:
        audit.append(Kind.CAMPAIGN_CANCELLED, subject, by=by)
        return
    name = pb.CampaignState.Name(state)  # type: ignore[arg-type]
    audit.append(
        Kind.CAMPAIGN_ENDED,
        subject,
        state=name.removeprefix("CAMPAIGN_STATE_").lower(),
        reason=reason,
        model_digest=campaign.model_digest.hex(),
    )


def round_ended(
    audit: AuditLog, campaign: Campaign, record: pb.Round, result: SumComputed | None
) -> None:
    """Tell of a round that was committed, with how many devices in its sum, or aborted, and why."""
    subject = f"round/{record.round_id}"
    numbers: dict[str, str | int] = {
        "campaign": campaign.campaign_id,
        "number": record.number,
        "num_invited": len(record.invited),
        "num_survivors": len(record.survivors),
        "num_lost": len(record.lost),
    }
    if record.stage == pb.ROUND_STAGE_COMMITTED:
        digest = campaign.model_digest.hex()
        audit.append(Kind.ROUND_COMMITTED, subject, **numbers, model_digest=digest)
    else:
        audit.append(Kind.ROUND_ABORTED, subject, **numbers, reason=record.reason)
    for device_id in () if result is None else result.liars:
        audit.append(Kind.FALSE_SHARES, f"device/{device_id}", round=record.round_id)
