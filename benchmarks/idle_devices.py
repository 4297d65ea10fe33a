"""Many devices in one process for `idle_fleet.py`: each has its own key, connection and stream.

They speak the real protocol through real mutual TLS: greet, beat as often as they are told, and
answer an invitation as a device does, with signed keys or, in a plain round, with an update that is
never sent. They have no models, no trainer and no files.

Reads one JSON object a line: first the fleet, then what to do.
"""

import asyncio
import ctypes
import json
import random
import signal
import sys
from typing import Any, Final

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from minga.federation import transport, wire
from minga.federation.device.machine import measure
from minga.federation.identity import CertificateVerifier, Identity
from minga.federation.secagg.device import DeviceSession
from minga.federation.secagg.plan import RoundPlan
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc

AT_ONCE: Final = 32
"""So many connect at a time: a handshake takes milliseconds, and its time-out runs."""

CONDITION: Final = wire.condition_to_wire(measure())
"""What each of them says of this machine, as agents do. They look anew each time; ten thousand on
one machine would take its time with that."""

RETRY_S: Final = 2.0
"""After this time at most a device that could not connect tries again."""


class Pulse:
    """How often a device beats, as it was last told."""

    interval_s = 0.0

    def take(self, welcome: pb.Welcome) -> None:
        """Do as told from the next beat on."""
        self.interval_s = welcome.heartbeat_interval_ms / 1000


class Crowd:
    """All devices of this process."""

    def __init__(self, address: str, identities: list[Identity]) -> None:
        self.num_connected = 0
        self.num_ended = 0
        self.num_retries = 0
        self.num_beats = 0
        self.num_invited = 0
        self._address = address
        self._gate = asyncio.Semaphore(AT_ONCE)
        self.tasks = [asyncio.create_task(self._live(one)) for one in identities]

    async def _live(self, identity: Identity) -> None:
        async with transport.open_channel(self._address, identity) as channel:
            pulse = Pulse()
            call = await self._connect(channel, pulse)
            self.num_connected += 1
            beating = asyncio.create_task(self._beat(call, pulse))
            try:
                await self._listen(call, identity, pulse)
            finally:
                beating.cancel()
                self.num_ended += 1

    async def _connect(self, channel: grpc.aio.Channel, pulse: "Pulse") -> Any:
        """Open the stream, as often as it takes: a handshake among thousands may be too slow."""
        while True:
            call = pb_grpc.FederationServiceStub(channel).Session()
            try:
                async with self._gate:
                    await call.write(
                        pb.SessionRequest(hello=pb.Hello(trains=True, condition=CONDITION))
                    )
                    first: Any = await call.read()
            except (grpc.RpcError, asyncio.InvalidStateError) as error:
                print(repr(error), file=sys.stderr, flush=True)
                self.num_retries += 1
                await asyncio.sleep(RETRY_S * random.random())
            else:
                pulse.take(first.welcome)
                return call

    async def _beat(self, call: Any, pulse: "Pulse") -> None:
        await asyncio.sleep(pulse.interval_s * random.random())
        while True:
            await call.write(pb.SessionRequest(heartbeat=pb.Heartbeat(condition=CONDITION)))
            self.num_beats += 1
            await asyncio.sleep(pulse.interval_s)

    async def _listen(self, call: Any, identity: Identity, pulse: "Pulse") -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            match message.WhichOneof("body"):
                case "welcome":
                    pulse.take(message.welcome)
                case "invite":
                    self.num_invited += 1
                    await call.write(answer_to(message.invite, identity))

    def describe(self) -> dict[str, int]:
        """Say how it stands."""
        return {
            "connected": self.num_connected - self.num_ended,
            "ended": self.num_ended,
            "retries": self.num_retries,
            "beats": self.num_beats,
            "invited": self.num_invited,
        }


def answer_to(invite: pb.RoundInvite, identity: Identity) -> pb.SessionRequest:
    """Advertise keys as a device does; in a plain round there is no such stage: leave it."""
    plan = wire.plan_of_invite(invite)
    if not isinstance(plan, RoundPlan):
        return wire.withdrawal(invite.round_id, "it only counts who is invited")
    session = DeviceSession(plan, identity, CertificateVerifier(authority=identity.authority))
    advert = session.advertise()
    return pb.SessionRequest(key_advert=wire.advert_to_wire(invite.round_id, advert))


async def main() -> None:
    """Bring the fleet up and answer what it is asked for."""
    loop = asyncio.get_running_loop()
    given = json.loads(await loop.run_in_executor(None, sys.stdin.readline))
    authority = x509.load_pem_x509_certificate(given["authority"].encode())
    identities = [
        Identity.of(
            load_pem_private_key(key.encode(), None),  # type: ignore[arg-type] # all are P-256
            x509.load_pem_x509_certificate(certificate.encode()),
            authority,
        )
        for key, certificate in given["identities"]
    ]
    crowd = Crowd(given["address"], identities)
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        assert json.loads(line) == {}
        print(json.dumps(crowd.describe()), flush=True)
    for task in crowd.tasks:
        task.cancel()


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with who started it: prctl(2)
    asyncio.run(main())
