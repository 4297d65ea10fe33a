"""Puts the coordinator together and runs it."""

import asyncio
import fcntl
import gc
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path

import grpc
from cryptography import x509
from prometheus_client import start_http_server

from minga.federation import transport
from minga.federation.audit import AUDITOR, format_time
from minga.federation.blobs import BlobStore
from minga.federation.coordinator.access import STRANGER, AccessInterceptor, Gatekeeper
from minga.federation.coordinator.audit_log import AuditLog, Kind
from minga.federation.coordinator.audited_tokens import AuditedTokens
from minga.federation.coordinator.authority import AUTHORITY_FOLDER, Authority
from minga.federation.coordinator.blob_service import BlobServicer
from minga.federation.coordinator.calls import RunningCalls
from minga.federation.coordinator.campaigns import Campaigns
from minga.federation.coordinator.credentials import OwnIdentity, ServerCertificate
from minga.federation.coordinator.enrolment import Enroller
from minga.federation.coordinator.enrolment_service import EnrolmentServicer
from minga.federation.coordinator.federation_service import FederationService
from minga.federation.coordinator.hub import Hub
from minga.federation.coordinator.identity_service import IdentityServicer
from minga.federation.coordinator.metrics import Metrics
from minga.federation.coordinator.models import PublishedModels
from minga.federation.coordinator.operator_service import OperatorService
from minga.federation.coordinator.pacing import window_ms
from minga.federation.coordinator.rate import Rate
from minga.federation.coordinator.renewal import Renewer
from minga.federation.coordinator.settings import CoordinatorSettings
from minga.federation.coordinator.store import DATABASE_FILE, Store
from minga.federation.coordinator.token_table import TokenTable
from minga.federation.coordinator.tokens import TokenIssuer, token_name
from minga.federation.enrolment_token import EnrolmentToken
from minga.federation.errors import (
    EnrolmentError,
    FederationError,
    IdentityError,
    PeerError,
    StorageError,
)
from minga.federation.identity import CertificateVerifier, Clock, Principal, Role, utc_now
from minga.federation.limits import (
    BLOB_GRACE_S,
    MAX_NAME_LENGTH,
    MAX_RENEWALS_PER_MINUTE,
    RENEWAL_CHECK_S,
)
from minga.federation.memory import keep_freed_memory
from minga.federation.operator import OPERATOR_FOLDER, write_address
from minga.federation.secagg.masking import ApplyMasks, apply_masks_threaded
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.v1 import federation_pb2_grpc as pb_grpc
from minga.federation.wire import printable

_log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where a running coordinator listens, `host:port` each."""

    device: str
    enrol: str
    metrics: str


class Coordinator:
    """One coordinator process. Use as an asynchronous context manager.

    Args:
        settings: How it is set up.
        clock: The time of rounds and blobs.
        certificate_clock: The time of certificates, tokens and the audit log.
        apply_masks: Takes the masks off a round's sum.

    Raises (on entering):
        PortInUseError: one of the ports is taken.
        IdentityError: the authority's files are damaged.
        StorageError: another coordinator has the state folder, or it cannot be used.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        clock: Callable[[], float] = time.time,
        certificate_clock: Clock = utc_now,
        apply_masks: ApplyMasks = apply_masks_threaded,
    ) -> None:
        self._settings = settings
        self._apply_masks = apply_masks
        self._clock = clock
        self._certificate_clock = certificate_clock
        self._stack = AsyncExitStack()
        self._driver: asyncio.Task[None] | None = None
        self._is_started = False
        self._own: dict[str, OwnIdentity] = {}
        self._calls = RunningCalls()

    async def __aenter__(self) -> "Coordinator":
        async with AsyncExitStack() as stack:
            await self._open(stack)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def wait(self) -> None:
        """Run until cancelled."""
        assert self._driver is not None
        await self._driver

    async def _open(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        for port in (settings.port, settings.enrol_port, settings.metrics_port):
            transport.require_free_port(settings.host, port)
        settings.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        stack.enter_context(_owned(settings.state))
        self._store = Store(settings.state / DATABASE_FILE)
        stack.callback(self._store.close)
        self._blobs = BlobStore(settings.state / "blobs", clock=self._clock)
        self._authority = Authority.open(
            settings.state / AUTHORITY_FOLDER,
            lifetimes=settings.lifetimes,
            clock=self._certificate_clock,
        )
        self._audit = self._open_audit(stack)
        self._hub = Hub(self._clock)
        self._metrics = Metrics()
        self._metrics.connected.set_function(self._hub.__len__)
        self._metrics.enrolled.set(self._store.num_enrolled())
        self._metrics.authority_end.set(self._authority.certificate.not_valid_after_utc.timestamp())
        self._campaigns = Campaigns(
            store=self._store,
            blobs=self._blobs,
            hub=self._hub,
            verifier=CertificateVerifier(
                authority=self._authority.certificate, clock=self._certificate_clock
            ),
            clock=self._clock,
            metrics=self._metrics,
            audit=self._audit,
            reconnect_grace_s=settings.reconnect_grace_s,
            strategies=settings.strategies,
            apply_masks=self._apply_masks,
        )
        self._metrics.recall(self._campaigns.describe())
        self._models = PublishedModels(
            store=self._store, hub=self._hub, audit=self._audit, clock=self._clock
        )
        self.collect_blobs()
        await self._listen(stack)
        self._driver = asyncio.create_task(self._campaigns.run())
        for task in (
            self._driver,
            asyncio.create_task(self._keep_clean()),
            asyncio.create_task(self._keep_valid()),
            asyncio.create_task(self._federation.close_silent()),
        ):
            stack.callback(task.cancel)

    def collect_blobs(self) -> int:
        """Delete blobs that nothing refers to (any more), and uploads that were given up.

        Updates that came too late, and models that nobody started a campaign from, would fill the
        disk otherwise.

        Returns:
            How many were deleted.
        """
        in_use = self._campaigns.blobs_in_use() | self._models.blobs_in_use()
        return self._blobs.collect(in_use, blob_grace_s=BLOB_GRACE_S)

    async def _keep_clean(self) -> None:
        while True:
            await asyncio.sleep(BLOB_GRACE_S)
            try:
                self.collect_blobs()
            except (OSError, StorageError):
                _log.exception("blobs that nothing refers to could not be deleted")

    def tend(self) -> None:
        """Issue anew what is due of the coordinator's own certificates, and sign the audit log."""
        if self._certificate.renew_if_due():
            self._audit.append(
                Kind.SERVER_CERTIFICATE_ISSUED,
                "coordinator",
                **_described(self._certificate.current().certificate),
            )
        if self._operator.renew_if_due():
            self._audit.append(
                Kind.OPERATOR_CERTIFICATE_ISSUED,
                "operator/operator",
                **_described(self._operator.current().certificate),
            )
        self._renewals.sweep()
        self._audit.tend()

    async def _keep_valid(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_CHECK_S)
            try:
                self.tend()
            except (OSError, FederationError):
                _log.exception("certificates or the audit log are not up to date, trying again")

    async def _listen(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        self._certificate = ServerCertificate(
            self._authority, sorted({settings.dial_host, settings.host})
        )
        self._metrics.certificate_end.set_function(self._certificate.valid_until)
        gatekeeper = Gatekeeper(
            authority=self._authority.certificate,
            is_revoked=self._is_revoked,
            clock=self._certificate_clock,
            root=self._authority.root,
            key_on_record=self._key_on_record,
        )
        interceptors = [
            transport.ErrorInterceptor(),
            AccessInterceptor(gatekeeper, self._note_refused_call, calls=self._calls),
        ]
        device_server = grpc.aio.server(interceptors=interceptors, options=transport.SERVER_OPTIONS)
        device_port = device_server.add_secure_port(
            f"{settings.host}:{settings.port}",
            transport.mutual_server_credentials(self._certificate.current),
        )
        enrol_server = grpc.aio.server(
            interceptors=interceptors, options=transport.ENROLMENT_SERVER_OPTIONS
        )
        enrol_port = enrol_server.add_secure_port(
            f"{settings.host}:{settings.enrol_port}",
            transport.open_server_credentials(self._certificate.current),
        )
        http, thread = start_http_server(
            settings.metrics_port, addr=settings.host, registry=self._metrics.registry
        )
        stack.callback(thread.join)
        stack.callback(http.server_close)
        stack.callback(http.shutdown)
        self.addresses = Addresses(
            device=f"{settings.dial_host}:{device_port}",
            enrol=f"{settings.dial_host}:{enrol_port}",
            metrics=f"{settings.host}:{http.server_port}",
        )
        tokens = TokenIssuer(
            store=AuditedTokens(TokenTable(self._store.connection), self._store, self._audit),
            enrol_address=self.addresses.enrol,
            device_address=self.addresses.device,
            authority_der=self._authority.pinned_der,
            intermediate_der=self._authority.intermediate_der,
            clock=self._certificate_clock,
        )
        self._add_services(device_server, enrol_server, tokens)
        self._operator = self._own_identity(OPERATOR_FOLDER, Role.OPERATOR, "operator")
        write_address(settings.state / OPERATOR_FOLDER, self.addresses.device)
        for server in (device_server, enrol_server):
            await server.start()
            stack.push_async_callback(server.stop, _STOP_GRACE_S)
        stack.callback(self._say_farewell)
        self._note_start()

    def _add_services(
        self, device_server: grpc.aio.Server, enrol_server: grpc.aio.Server, tokens: TokenIssuer
    ) -> None:
        enroller = Enroller(
            authority=self._authority, tokens=tokens, register_device=self._register
        )
        pb_grpc.add_EnrollmentServiceServicer_to_server(
            EnrolmentServicer(enroller, self._note_refused_enrolment), enrol_server
        )
        self._renewals = Rate[str](
            per_minute=MAX_RENEWALS_PER_MINUTE, clock=self._certificate_clock
        )
        renewer = Renewer(authority=self._authority, key_on_record=self._key_on_record)
        pb_grpc.add_IdentityServiceServicer_to_server(
            IdentityServicer(renewer, self._audit, self._renewals), device_server
        )
        self._federation = FederationService(
            store=self._store,
            hub=self._hub,
            campaigns=self._campaigns,
            models=self._models,
            metrics=self._metrics,
            clock=self._clock,
            heartbeat_interval_s=self._settings.heartbeat_interval_s,
            reconnect_window_ms=self._reconnect_window_ms,
            audit=self._audit,
        )
        pb_grpc.add_FederationServiceServicer_to_server(self._federation, device_server)
        blobs = BlobServicer(
            self._blobs,
            may_upload=self._may_upload,
            may_download=self._may_download,
            on_transfer=self._count_transfer,
            on_refused=self._note_refused_blob,
        )
        blobs.add_to(device_server)
        operators = OperatorService(
            store=self._store,
            blobs=self._blobs,
            hub=self._hub,
            campaigns=self._campaigns,
            models=self._models,
            metrics=self._metrics,
            audit=self._audit,
            mint_token=partial(self._mint, tokens),
            own_identities=self._own,
            calls=self._calls,
            clock=self._clock,
        )
        pb_grpc.add_OperatorServiceServicer_to_server(operators, device_server)

    def _reconnect_window_ms(self) -> int:
        return window_ms(len(self._hub), self._settings.reconnects_per_s)

    def _say_farewell(self) -> None:
        going = pb.GoingAway(reconnect_window_ms=self._reconnect_window_ms())
        self._hub.drop_all(pb.SessionResponse(going_away=going))

    # --- policy ---

    def _is_revoked(self, principal: Principal) -> bool:
        if principal.role is not Role.DEVICE:  # one of this coordinator's own
            own = self._own.get(principal.path)
            return own is None or own.key_digest != principal.key_digest
        device = self._store.device(principal.name)
        return device is None or device.revoked_at is not None

    def _register(self, device_id: str, group: str, key_digest: bytes) -> None:
        with self._store.transaction():
            self._store.register_device(device_id, group, key_digest, self._clock())
            self._audit.append_limited(
                Kind.DEVICE_ENROLLED, f"device/{device_id}", group=group, key=key_digest.hex()
            )
        self._metrics.enrolled.set(self._store.num_enrolled())

    def _key_on_record(self, device_id: str) -> bytes | None:
        device = self._store.device(device_id)
        return None if device is None else device.key_digest

    def _mint(
        self, tokens: TokenIssuer, group: str, lifetime_s: float, by: str
    ) -> tuple[str, float]:
        lifetime = timedelta(seconds=lifetime_s)
        with self._store.transaction():
            text = tokens.mint(group, lifetime)
            name = token_name(EnrolmentToken.parse(text).secret)
            self._audit.append(
                Kind.TOKEN_MADE, f"token/{name}", group=group, lifetime_s=int(lifetime_s), by=by
            )
        return text, self._clock() + lifetime_s

    def _may_upload(self, principal: Principal, digest: bytes, size: int) -> bool:
        """Operators bring models; a device brings its update of the round that waits for it."""
        if principal.role is Role.OPERATOR:
            return True
        return self._campaigns.expects_upload(principal.name, digest, size)

    def _may_download(self, principal: Principal, digest: bytes) -> bool:
        """Operators read models; a device reads what it is to train or to run."""
        if principal.role is Role.OPERATOR:
            return True
        return self._campaigns.needs_blob(digest) or self._models.needs_blob(digest)

    def _count_transfer(self, principal: Principal, received: int, sent: int) -> None:
        if principal.role is Role.DEVICE:
            self._campaigns.count_transfer(principal.name, received=received, sent=sent)

    # --- what is this coordinator's own ---

    def _own_identity(self, folder: str, role: Role, name: str) -> OwnIdentity:
        identity = OwnIdentity(self._authority, self._settings.state / folder, role, name)
        self._own[f"{role}/{name}"] = identity
        return identity

    def _open_audit(self, stack: AsyncExitStack) -> AuditLog:
        auditor = self._own_identity(AUDITOR, Role.SERVICE, AUDITOR)
        audit = AuditLog(self._store, signer=auditor.current, clock=self._certificate_clock)
        stack.callback(self._close_audit)
        return audit

    def _note_start(self) -> None:
        self._audit.append(
            Kind.COORDINATOR_STARTED,
            "coordinator",
            version=version("minga"),
            **_described(self._certificate.current().certificate),
        )
        self._audit.sign()
        self._is_started = True

    def _close_audit(self) -> None:
        try:
            if self._is_started:
                self._audit.append(Kind.COORDINATOR_STOPPED, "coordinator")
            self._audit.close()
        except FederationError:
            _log.exception("the end of the audit log is not signed")

    def _note_refused_call(self, caller: str, peer: str, method: str, error: IdentityError) -> None:
        self._audit.append_limited(
            Kind.ACCESS_REFUSED, caller, method=method, peer=peer, reason=printable(str(error))
        )

    def _note_refused_blob(self, principal: Principal, digest: bytes, error: PeerError) -> None:
        self._audit.append_limited(
            Kind.MESSAGE_REFUSED, principal.path, blob=digest.hex(), reason=printable(str(error))
        )

    def _note_refused_enrolment(
        self, request: pb.EnrollRequest, peer: str, error: EnrolmentError
    ) -> None:
        self._audit.append_limited(
            Kind.ENROLMENT_REFUSED,
            STRANGER,
            name=printable(request.device_name)[:MAX_NAME_LENGTH],
            token=token_name(request.token_secret),
            peer=peer,
            reason=printable(str(error)),
        )


def _described(certificate: x509.Certificate) -> dict[str, str]:
    return {
        "serial": f"{certificate.serial_number:x}",
        "valid_until": format_time(certificate.not_valid_after_utc),
    }


@contextmanager
def _owned(state: Path) -> Iterator[None]:
    """Hold the state folder; the hold ends with this process, however that ends."""
    with (state / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                f"another coordinator runs in {state}; stop it or choose another state folder"
            ) from error
        yield


async def run(
    settings: CoordinatorSettings, apply_masks: ApplyMasks = apply_masks_threaded
) -> None:
    """Run a coordinator until cancelled."""
    keep_freed_memory()
    async with Coordinator(settings, apply_masks=apply_masks) as coordinator:
        _log.info("devices: %s (mutual TLS)", coordinator.addresses.device)
        _log.info("enrolment: %s (TLS)", coordinator.addresses.enrol)
        _log.info("metrics: http://%s/metrics", coordinator.addresses.metrics)
        gc.freeze()  # what is loaded stays; looking through it again costs rounds their time
        await coordinator.wait()
