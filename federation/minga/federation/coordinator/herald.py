"""Tells devices what to do in the open round."""

from minga.federation import wire
from minga.federation.coordinator.hub import Connection, Hub
from minga.federation.coordinator.rounds import Round, Stage


class Herald:
    """Sends every device its instruction, once per stream and stage.

    Within a stage an instruction only changes when its device is lost. So it is made once, and not
    at each of the cohort's answers: making it takes time with the neighbours.
    """

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        # Device -> where and when it was last told what to do.
        self._told: dict[str, tuple[Connection, str, Stage | None]] = {}

    def tell(self, round_: Round) -> int:
        """Tell all who are connected and do not know yet; gives the bytes that were sent."""
        num_bytes = 0
        for device_id in round_.order.invited:
            connection = self._hub.connection(device_id)
            if connection is None:
                continue
            is_lost = device_id in round_.lost and not round_.stage.ended
            told = (connection, round_.order.round_id, None if is_lost else round_.stage)
            if self._told.get(device_id) == told:
                continue
            instruction = round_.instruction(device_id)
            if instruction is not None:
                message = wire.instruction_to_wire(round_.order.round_id, instruction)
                if not connection.send(message):
                    continue
                num_bytes += message.ByteSize()
            self._told[device_id] = told
        return num_bytes

    def forget(self) -> None:
        """Forget a round that is over."""
        self._told.clear()
