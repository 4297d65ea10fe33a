"""Which devices a round may invite."""

import secrets
from dataclasses import dataclass

from minga.federation import wire
from minga.federation.coordinator.campaign import Campaign
from minga.federation.coordinator.hub import Hub
from minga.federation.coordinator.store import Store
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Training, Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Muster:
    """Who could take part in a round now."""

    present: tuple[str, ...]
    """Connected devices that meet the campaign's requirements and are free."""
    going: tuple[str, ...]
    """Devices that go on from the round before; they are in anyway."""
    num_wanted: int
    num_unfit: int
    """So many more are connected, but do not meet the requirements."""
    is_enough: bool

    @property
    def reason(self) -> str:
        """Say what is waited for."""
        count = len(self.going) + len(self.present)
        reason = f"waiting for devices: {count} of {self.num_wanted} are connected"
        if self.num_unfit:
            reason += f", {self.num_unfit} more do not meet the campaign's requirements"
        return reason

    def draw(self) -> tuple[str, ...]:
        """Give those that go on, and draw others at random until there are as many as wanted."""
        drawn = list(self.present)
        secrets.SystemRandom().shuffle(drawn)
        return (*self.going, *drawn)[: self.num_wanted]


def muster(hub: Hub, campaign: Campaign, work: Work, *, is_late: bool) -> Muster:
    """Look who is there.

    Args:
        hub: knows who is connected.
        campaign: for which a round is to begin.
        work: what the round asks.
        is_late: whether the time to wait for more than the minimum is over.
    """
    plan, busy = campaign.plan, campaign.carried()
    requirements = wire.requirements_from_wire(plan)
    free = [c for c in hub.connected(plan.group) if c.trains and c.device_id not in busy]
    present = tuple(c.device_id for c in free if requirements.are_met_by(c.condition))
    going: tuple[str, ...] = ()
    least, wanted = plan.min_cohort, campaign.num_wanted
    if isinstance(work, Training) and plan.HasField("buffer"):
        # It waits for no one whom it does not need.
        going, least, is_late = tuple(sorted(busy)), plan.buffer.size, True
    count = len(going) + len(present)
    return Muster(
        present=present,
        going=going,
        num_wanted=wanted,
        num_unfit=len(free) - len(present),
        is_enough=count >= wanted or (is_late and count >= least),
    )


def trainable(store: Store, plan: pb.CampaignPlan) -> int:
    """Count the devices that a campaign's control variate is a mean over, connected or not."""
    if not plan.scaffold:
        return 0
    return sum(row.trains and row.revoked_at is None for row in store.devices(plan.group))
