"""The devices' control stream."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version

import grpc

from minga.federation import wire
from minga.federation.coordinator.access import principal_of_call
from minga.federation.coordinator.audit_log import AuditLog, Kind
from minga.federation.coordinator.campaigns import Campaigns
from minga.federation.coordinator.hub import Connection, Hub
from minga.federation.coordinator.metrics import Metrics
from minga.federation.coordinator.models import PublishedModels
from minga.federation.coordinator.rounds import DeviceLost
from minga.federation.coordinator.store import Store
from minga.federation.errors import FederationError, IdentityError, PeerError
from minga.federation.identity import Principal
from minga.federation.limits import SILENT_HEARTBEATS
from minga.federation.secagg.plan import ROUND_ID_BYTES
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from minga.federation.wire import printable

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
        heartbeat_interval_s: float,
        reconnect_window_ms: Callable[[], int],
        audit: AuditLog,
    ) -> None:
        self._store = store
        self._hub = hub
        self._campaigns = campaigns
        self._models = models
        self._metrics = metrics
        self._clock = clock
        self._heartbeat_interval_s = heartbeat_interval_s
        self._reconnect_window_ms = reconnect_window_ms
        self._audit = audit

    async def Session(
        self,
        request_iterator: AsyncIterator[pb.SessionRequest | None],
        context: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse],
    ) -> AsyncIterator[pb.SessionResponse]:
        """Serve one device until it leaves or falls silent, is revoked, or opens another stream."""
        principal = principal_of_call(context)
        device_id = principal.name
        requests = self._heard(device_id, request_iterator)
        first = await anext(requests, None)
        if first is None or first.WhichOneof("body") != "hello":
            raise PeerError("a session starts with a hello")
        opening, connection = self._welcome(principal, first.hello)
        reader = asyncio.create_task(self._read(connection, requests))
        try:
            for first_message in opening:
                yield first_message
            while (message := await connection.outbox.get()) is not None:
                yield message
        finally:
            reader.cancel()
            self._hub.leave(connection)
            self._store.note_seen(device_id, connection.heard_at)

    def _welcome(
        self, principal: Principal, hello: pb.Hello
    ) -> tuple[list[pb.SessionResponse], Connection]:
        """Register the stream; give what the device must know at once."""
        device_id = principal.name
        device = self._store.device(device_id)
        if device is None:
            raise IdentityError(f"{principal} is not enrolled")
        now = self._clock()
        self._store.note_hello(
            device_id,
            trains=hello.trains,
            agent_version=printable(hello.agent_version)[:64],
            at=now,
        )
        if hello.HasField("model"):
            self._models.note_report(device_id, hello.model)
        welcome = pb.Welcome(
            coordinator_version=version("minga"),
            heartbeat_interval_ms=round(self._heartbeat_interval_s * 1000),
            reconnect_window_ms=self._reconnect_window_ms(),
        )
        opening = [
            pb.SessionResponse(welcome=welcome),
            *self._models.offers_to(device.group, hello.model),
            *self._campaigns.greeting(device_id, hello.round_id),
        ]
        task = asyncio.current_task()
        assert task is not None
        connection = Connection(
            device_id,
            device.group,
            hello.trains,
            now,
            cut=task.cancel,
            serial=principal.serial,
            condition=wire.condition_from_wire(hello),
        )
        self._hub.join(connection)
        return opening, connection

    async def _heard(
        self, device_id: str, requests: AsyncIterator[pb.SessionRequest | None]
    ) -> AsyncIterator[pb.SessionRequest | None]:
        """Give what a device says, until it says nothing for several heartbeats.

        What cannot be read is None: it shows that the device is alive, if nothing else.

        Raises:
            PeerError: it fell silent.
        """
        patience_s = SILENT_HEARTBEATS * self._heartbeat_interval_s
        while True:
            try:
                async with asyncio.timeout(patience_s):
                    request = await anext(requests)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise PeerError(f"{device_id} was silent for {patience_s:g} s") from None
            yield request

    async def _read(
        self, connection: Connection, requests: AsyncIterator[pb.SessionRequest | None]
    ) -> None:
        """Take the device's messages; a bad one is refused and the stream goes on."""
        try:
            async for request in requests:
                if connection.is_closed:
                    return
                connection.heard_at = self._clock()
                self._take(connection, request)
        except grpc.RpcError:
            pass  # the link broke; the device comes back by itself
        except FederationError as error:
            _log.warning("closing the stream of %s: %s", connection.device_id, error)
        except Exception:  # noqa: BLE001 - the outermost frame of this task
            _log.exception("closing the stream of %s", connection.device_id)
        finally:
            connection.close()

    def _take(self, connection: Connection, request: pb.SessionRequest | None) -> None:
        """Hand a message on, or tell the device why it was refused."""
        device_id, round_id = connection.device_id, ""
        try:
            if request is None:
                raise PeerError("the message cannot be read: it is none of a device's")
            match request.WhichOneof("body"):
                case "heartbeat":
                    connection.condition = wire.condition_from_wire(request.heartbeat)
                    beat = pb.Heartbeat(reconnect_window_ms=self._reconnect_window_ms())
                    connection.send(pb.SessionResponse(heartbeat=beat))
                case "model_report":
                    self._models.note_report(device_id, request.model_report)
                case _:
                    round_id = printable(wire.round_of(request))[: 2 * ROUND_ID_BYTES]
                    round_id, event = wire.event_from_wire(device_id, request)
                    self._campaigns.take(event, round_id, request.ByteSize())
                    if isinstance(event, DeviceLost):
                        # It may have refused what another one sent it through this coordinator.
                        self._audit.append_limited(
                            Kind.DEVICE_WITHDREW,
                            f"device/{device_id}",
                            round=round_id,
                            reason=event.reason,
                        )
        except PeerError as error:
            self._metrics.refused.inc()
            reason = printable(str(error))
            is_written = self._audit.append_limited(
                Kind.MESSAGE_REFUSED, f"device/{device_id}", round=round_id, reason=reason
            )
            if is_written:  # else the log on the disk is what a device could fill
                _log.warning("refused a message of %s: %s", device_id, reason)
            refusal = pb.Refusal(round_id=round_id, reason=reason)
            connection.send(pb.SessionResponse(refusal=refusal))
