"""Tells devices what to do in the open round."""

from collections.abc import Callable, Collection

from minga.federation import wire
from minga.federation.coordinator.hub import Connection, Hub
from minga.federation.coordinator.rounds import Round, Stage


class Herald:
    """Sends every device its instruction, once per stream and stage.

    Within a stage an instruction only changes when its device is lost. So it is made once, and not
    at each of the cohort's answers: making it takes time with the neighbours.

    Args:
        hub: the ways to the devices.
        sync: brings to the disk what instructions follow from: a loss of power must not take it
            back once a device was told.
    """

    def __init__(self, hub: Hub, sync: Callable[[], None]) -> None:
        self._hub = hub
        self._sync = sync
        # Device -> where and when it was last told what to do.
        self._told: dict[str, tuple[Connection, str, Stage | None]] = {}

    def tell(self, round_: Round) -> int:
        """Tell all who are connected and do not know yet; gives the bytes that were sent.

        Raises:
            StorageError: the disk fails; nobody was told.
        """
        self._sync()
        num_bytes = 0
        for device_id in round_.order.invited:
            connection = self._hub.connection(device_id)
            if connection is None:
                continue
            told = (connection, *round_.occasion(device_id))
            if self._told.get(device_id) == told:
                continue
            instruction = round_.instruction(device_id)
            if instruction is not None:
                message = wire.instruction_to_wire(round_.round_id_of(device_id), instruction)
                if not connection.send(message):
                    continue
                num_bytes += message.ByteSize()
            self._told[device_id] = told
        return num_bytes

    def forget(self, but: Collection[str] = ()) -> None:
        """Forget a round that is over, but for devices that go on into the next one."""
        self._told = {name: told for name, told in self._told.items() if name in but}

    def ask_again(self, device_id: str) -> None:
        """Tell a device once more what to do: its answer came when nobody could take it."""
        self._told.pop(device_id, None)
