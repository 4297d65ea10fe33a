"""The device that the demo kills in the middle of a round, and starts again afterwards."""

from collections.abc import Callable

from minga.cluster.processes import LocalFleet
from minga.federation.v1 import federation_pb2 as pb

FIRST_ROUND = 2
"""The first round shows the undisturbed way."""


class Victim:
    """Kills one device once it has shared its keys, and starts it again when the round is over.

    Give `watch` to whoever follows the campaign. If a kill came too late, since the device's update
    was in already, the next round is tried.

    Args:
        name: which device.
        start: starts a device by name.
        fleet: whose processes they are.
    """

    def __init__(self, name: str, start: Callable[[str], None], fleet: LocalFleet) -> None:
        self.name = name
        self.round: pb.Round | None = None
        self._start = start
        self._fleet = fleet
        self._killed_in = ""

    def watch(self, campaign: pb.Campaign) -> None:
        """Look at a campaign's newest state."""
        if not campaign.rounds or self.round is not None:
            return
        newest = campaign.rounds[-1]
        if not self._killed_in and self._is_time(newest):
            self._fleet.child(self.name).kill()
            self._killed_in = newest.round_id
        for round_ in campaign.rounds:
            if round_.round_id == self._killed_in and round_.stage >= pb.ROUND_STAGE_COMMITTED:
                self._judge(round_)

    def _is_time(self, round_: pb.Round) -> bool:
        return (
            round_.number >= FIRST_ROUND
            and round_.stage in (pb.ROUND_STAGE_SHARES, pb.ROUND_STAGE_UPDATES)
            and self.name in round_.sharers
            and self.name not in round_.survivors
        )

    def _judge(self, round_: pb.Round) -> None:
        self._killed_in = ""
        if round_.stage == pb.ROUND_STAGE_COMMITTED and self.name not in round_.survivors:
            self.round = round_
        self._start(self.name)
