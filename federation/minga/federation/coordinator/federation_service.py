"""The devices' control stream."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, Final, TypeAlias

import grpc

from minga.federation import wire
from minga.federation.coordinator.access import principal_of_call
from minga.federation.coordinator.audit_log import AuditLog, Kind
from minga.federation.coordinator.campaigns import Campaigns
from minga.federation.coordinator.hub import Connection, Hub
from minga.federation.coordinator.metrics import Metrics
from minga.federation.coordinator.models import PublishedModels
from minga.federation.coordinator.rate import Buckets
from minga.federation.coordinator.rounds import DeviceLost
from minga.federation.coordinator.store import Store
from minga.federation.errors import FederationError, IdentityError, LimitError, PeerError
from minga.federation.identity import Principal
from minga.federation.limits import (
    HEARTBEATS_PER_S,
    MAX_VERSION_CHARS,
    RATED_MESSAGE_BYTES,
    SILENT_HEARTBEATS,
)
from minga.federation.secagg.plan import ROUND_ID_BYTES
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from minga.federation.wire import printable

_log = logging.getLogger(__name__)

VERSION: Final = version("minga")

Stream: TypeAlias = "grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse]"


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
        rate: Buckets[str],
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
        self._rate = rate

    async def Session(  # type: ignore[override] # gRPC takes a coroutine as well
        self,
        request_iterator: object,
        context: Stream,
    ) -> None:
        """Serve one device until it leaves or falls silent, is revoked, or opens another stream.

        It reads and writes through the context: iterators and generators would take some KiB more
        for each device that waits.
        """
        principal = principal_of_call(context)
        opening, connection = self._welcome(principal, await self._hello(principal, context))
        reader = asyncio.create_task(self._read(connection, context))
        try:
            for first_message in opening:
                await context.write(first_message)
            while (message := await connection.outbox.get()) is not None:
                await context.write(message)
            if connection.error is not None:
                raise connection.error
        finally:
            reader.cancel()
            self._hub.leave(connection)
            self._store.note_seen(connection.device_id, connection.heard_at)

    async def _hello(self, principal: Principal, context: Stream) -> pb.Hello:
        """Wait for what a session starts with."""
        patience_s = SILENT_HEARTBEATS * self._heartbeat_interval_s
        try:
            async with asyncio.timeout(patience_s):
                first: Any = await context.read()
        except TimeoutError:
            raise PeerError(f"{principal.name} was silent for {patience_s:g} s") from None
        is_message = first is not None and first is not grpc.aio.EOF
        if not is_message or first.WhichOneof("body") != "hello":
            raise PeerError("a session starts with a hello")
        hello: pb.Hello = first.hello
        return hello

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
            agent_version=printable(hello.agent_version)[:MAX_VERSION_CHARS],
            at=now,
        )
        if hello.HasField("model"):
            self._models.note_report(device_id, hello.model)
        interval_s = self._interval_s()
        opening = [
            self._greeting(interval_s),
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
            heartbeat_interval_s=interval_s,
            patience_s=SILENT_HEARTBEATS * interval_s,
            heard_last=asyncio.get_running_loop().time(),
        )
        self._hub.join(connection)
        return opening, connection

    def _interval_s(self) -> float:
        """Say how often a device should beat: the more there are, the less often each."""
        return max(self._heartbeat_interval_s, len(self._hub) / HEARTBEATS_PER_S)

    def _answer_beat(self, connection: Connection) -> pb.SessionResponse:
        """Answer a heartbeat; with a new interval, if the fleet has grown or shrunk since."""
        before, now = connection.heartbeat_interval_s, self._interval_s()
        if 0.75 * before <= now <= 1.25 * before:
            connection.patience_s = SILENT_HEARTBEATS * before
            beat = pb.Heartbeat(reconnect_window_ms=self._reconnect_window_ms())
            return pb.SessionResponse(heartbeat=beat)
        # Its next beat may still come after the interval from before.
        connection.heartbeat_interval_s = now
        connection.patience_s = SILENT_HEARTBEATS * max(before, now)
        return self._greeting(now)

    def _greeting(self, interval_s: float) -> pb.SessionResponse:
        """Greet a device; in the middle of a stream this tells it how often to beat from now on."""
        welcome = pb.Welcome(
            coordinator_version=VERSION,
            heartbeat_interval_ms=round(interval_s * 1000),
            reconnect_window_ms=self._reconnect_window_ms(),
        )
        return pb.SessionResponse(welcome=welcome)

    async def close_silent(self) -> None:
        """Close streams on which nothing came for several heartbeats, until cancelled.

        All are looked at together: a timer for each would be set anew at every message.
        """
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._heartbeat_interval_s)
            for connection in self._hub.connected():
                silent_s = loop.time() - connection.heard_last
                if silent_s > connection.patience_s and not connection.is_closed:
                    _log.warning(
                        "closing the stream of %s: silent for %.3g s",
                        connection.device_id,
                        silent_s,
                    )
                    connection.close()

    async def _read(self, connection: Connection, context: Stream) -> None:
        """Take the device's messages; a bad one is refused and the stream goes on."""
        time = asyncio.get_running_loop().time
        try:
            read: Callable[[], Awaitable[Any]] = context.read  # gives None for what is no message
            while (request := await read()) is not grpc.aio.EOF:
                if connection.is_closed:
                    return
                connection.heard_at = self._clock()
                connection.heard_last = time()
                self._require_allowed(connection, request)
                self._take(connection, request)
        except grpc.RpcError:
            pass  # the link broke; the device comes back by itself
        except LimitError as error:
            connection.error = error  # sent behind what is queued
            self._note_refused(connection, "", str(error))
        except FederationError as error:
            _log.warning("closing the stream of %s: %s", connection.device_id, error)
        except Exception:  # noqa: BLE001 - the outermost frame of this task
            _log.exception("closing the stream of %s", connection.device_id)
        finally:
            connection.close()

    def _require_allowed(self, connection: Connection, request: pb.SessionRequest | None) -> None:
        """Make sure that a device does not send too much; a new stream begins where this one ends.

        Raises:
            LimitError: it does.
        """
        amount = 1 + (request.ByteSize() if request else 0) // RATED_MESSAGE_BYTES
        if not self._rate.allows(connection.device_id, amount):
            raise LimitError(
                f"{connection.device_id} sends more than {self._rate.per_s:g} messages a second; "
                "the stream is closed"
            )

    def _note_refused(self, connection: Connection, round_id: str, reason: str) -> None:
        """Write that a message was refused."""
        self._metrics.refused.inc()
        is_written = self._audit.append_limited(
            Kind.MESSAGE_REFUSED, f"device/{connection.device_id}", round=round_id, reason=reason
        )
        if is_written:  # else the log on the disk is what a device could fill
            _log.warning("refused a message of %s: %s", connection.device_id, reason)

    def _take(self, connection: Connection, request: pb.SessionRequest | None) -> None:
        """Hand a message on, or tell the device why it was refused."""
        device_id, round_id = connection.device_id, ""
        try:
            if request is None:
                raise PeerError("the message cannot be read: it is none of a device's")
            match request.WhichOneof("body"):
                case "heartbeat":
                    connection.condition = wire.condition_from_wire(request.heartbeat)
                    connection.send(self._answer_beat(connection))
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
            reason = printable(str(error))
            self._note_refused(connection, round_id, reason)
            refusal = pb.Refusal(round_id=round_id, reason=reason)
            connection.send(pb.SessionResponse(refusal=refusal))
