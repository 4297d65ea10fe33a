"""Which devices a round may invite."""

from minga.federation import wire
from minga.federation.coordinator.hub import Hub
from minga.federation.coordinator.store import Store
from minga.federation.v1 import federation_pb2 as pb


def candidates(hub: Hub, plan: pb.CampaignPlan) -> tuple[list[str], int]:
    """Look who is there.

    Returns:
        The connected devices that a campaign may invite, and how many more there would be if they
        met its requirements.
    """
    requirements = wire.requirements_from_wire(plan)
    training = [c for c in hub.connected(plan.group) if c.trains]
    fit = [c.device_id for c in training if requirements.are_met_by(c.condition)]
    return fit, len(training) - len(fit)


def trainable(store: Store, plan: pb.CampaignPlan) -> int:
    """Count the devices that a campaign's control variate is a mean over, connected or not."""
    if not plan.scaffold:
        return 0
    return sum(row.trains and row.revoked_at is None for row in store.devices(plan.group))
