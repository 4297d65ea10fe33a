"""The devices' control stream."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version

import grpc

from minga.federation import wire
from minga.federation.coordinator.access import principal_of_call
from minga.federation.coordinator.campaigns import Campaigns
from minga.federation.coordinator.hub import Connection, Hub
from minga.federation.coordinator.metrics import Metrics
from minga.federation.coordinator.models import PublishedModels
from minga.federation.coordinator.store import Store
from minga.federation.errors import PeerError
from minga.federation.limits import HEARTBEAT_INTERVAL_S, MAX_REASON_CHARS
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)


class FederationService(pb_grpc.FederationServiceServicer):
    """One stream per device: what it answers goes to its round, what it has to do comes back."""

    def __init__(
        self,
        *,
        store: Store,
        hub: Hub,
        campaigns: Campaigns,
        models: PublishedModels,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._hub = hub
        self._campaigns = campaigns
        self._models = models
        self._metrics = metrics
        self._clock = clock

    async def Session(
        self,
        request_iterator: AsyncIterator[pb.SessionRequest],
        context: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse],
    ) -> AsyncIterator[pb.SessionResponse]:
        """Serve one device until it leaves, is replaced by a newer stream, or is revoked."""
        device_id = principal_of_call(context).name
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("body") != "hello":
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION, "a session starts with a hello"
            )
        connection = self._welcome(device_id, first.hello)
        reader = asyncio.create_task(self._read(connection, request_iterator))
        try:
            while (message := await connection.outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            self._hub.leave(connection)
            self._metrics.connected.set(len(self._hub.connected()))
            self._store.note_seen(device_id, self._clock())

    def _welcome(self, device_id: str, hello: pb.Hello) -> Connection:
        """Register the stream; everything the device must know goes into its outbox."""
        self._store.note_hello(
            device_id, trains=hello.trains, agent_version=hello.agent_version[:64], at=self._clock()
        )
        device = self._store.device(device_id)
        assert device is not None, "the interceptor lets enrolled devices in"
        connection = Connection(device_id, device.group, hello.trains)
        connection.send(
            pb.SessionResponse(
                welcome=pb.Welcome(
                    coordinator_version=version("minga"),
                    heartbeat_interval_ms=int(HEARTBEAT_INTERVAL_S * 1000),
                )
            )
        )
        if hello.HasField("model"):
            self._models.note_report(device_id, hello.model)
        self._hub.join(connection)
        self._metrics.connected.set(len(self._hub.connected()))
        self._models.offer_to(connection, hello.model)
        self._campaigns.greet(connection, hello.round_id)
        return connection

    async def _read(
        self, connection: Connection, requests: AsyncIterator[pb.SessionRequest]
    ) -> None:
        """Take the device's messages; a bad one is refused and the stream goes on."""
        try:
            async for request in requests:
                self._take(connection, request)
        except grpc.RpcError:
            pass  # the link broke; the device comes back by itself
        finally:
            connection.close()

    def _take(self, connection: Connection, request: pb.SessionRequest) -> None:
        device_id = connection.device_id
        match request.WhichOneof("body"):
            case "heartbeat":
                self._store.note_seen(device_id, self._clock())
                connection.send(pb.SessionResponse(heartbeat=pb.Heartbeat()))
            case "model_report":
                self._models.note_report(device_id, request.model_report)
            case _:
                self._answer(connection, request)

    def _answer(self, connection: Connection, request: pb.SessionRequest) -> None:
        """Hand an answer to its round, or tell the device why it was refused."""
        round_id = ""
        try:
            round_id, event = wire.event_from_wire(connection.device_id, request)
            self._campaigns.take(event, round_id, request.ByteSize())
        except PeerError as error:
            self._metrics.refused.inc()
            _log.warning("refused a message of %s: %s", connection.device_id, error)
            refusal = pb.Refusal(round_id=round_id, reason=str(error)[:MAX_REASON_CHARS])
            connection.send(pb.SessionResponse(refusal=refusal))
