"""This device's part in one round.

Holds the round's secrets and the update, in memory alone, until the round ends. Training starts
with the invitation and runs while keys and shares are exchanged. The coordinator may ask for a step
again after a broken link or a restart; the answer is then the same as before.
"""

import asyncio
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from minga.federation import wire
from minga.federation.device.metrics import Metrics
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.errors import FederationError, PeerError, TrainerError, UnreachableError
from minga.federation.identity import CertificateVerifier, Identity
from minga.federation.parameters import Layout, from_bytes
from minga.federation.secagg.device import DeviceSession
from minga.federation.trainer import Update
from minga.federation.transfer import digest_of
from minga.federation.v1 import federation_pb2 as pb

_log = logging.getLogger(__name__)

Upload = Callable[[bytes, bytes], Awaitable[None]]
"""Sends bytes under their digest, resuming by itself."""

Download = Callable[[bytes, Path], Awaitable[None]]
"""Fetches the blob of a digest into a file, resuming by itself."""


class Participant:
    """One device in one round."""

    def __init__(
        self,
        invite: pb.RoundInvite,
        *,
        identity: Identity,
        trainer: TrainerProcess,
        download: Download,
        upload: Upload,
        metrics: Metrics,
    ) -> None:
        self.round_id = invite.round_id
        self._model_digest = invite.model_digest
        self._training = wire.config_from_wire(invite.training)
        self._plan = wire.plan_of_invite(invite)
        verifier = CertificateVerifier(authority=identity.authority)
        self._session = DeviceSession(self._plan, identity, verifier)
        self._trainer = trainer
        self._download = download
        self._upload = upload
        self._metrics = metrics
        self._turn = asyncio.Lock()
        self._update = asyncio.create_task(self._train())

    def close(self) -> asyncio.Task[Update]:
        """Forget the round; training that still runs is stopped.

        Returns:
            The training, which may take a moment to end.
        """
        self._update.cancel()
        return self._update

    async def answer(self, message: pb.SessionResponse) -> pb.SessionRequest:
        """Do what the coordinator asks, or withdraw and say why."""
        async with self._turn:
            try:
                return await self._answer(message)
            except TrainerError as error:
                # What user code says may hold data of this site: it stays in this site's log.
                _log.error("round %s: training failed: %s", self.round_id, error)
                return self._withdraw("training failed on the device")
            except UnreachableError:
                raise  # asked again after the reconnect
            except FederationError as error:
                _log.warning("round %s: the coordinator is refused: %s", self.round_id, error)
                return self._withdraw(f"{type(error).__name__} on the device: {error}")
            except Exception:  # noqa: BLE001 - the round is told at once, not at its deadline
                _log.exception("round %s: this device failed", self.round_id)
                return self._withdraw("the device failed; its own log says why")

    async def _answer(self, message: pb.SessionResponse) -> pb.SessionRequest:
        match message.WhichOneof("body"):
            case "invite":
                advert = self._session.advertise()
                return pb.SessionRequest(key_advert=wire.advert_to_wire(self.round_id, advert))
            case "neighbour_keys":
                adverts = [wire.advert_from_wire(a) for a in message.neighbour_keys.adverts]
                shares = self._session.share(adverts)
                return pb.SessionRequest(shares=wire.shares_to_wire(self.round_id, shares))
            case "neighbour_shares":
                return await self._send_update(message.neighbour_shares)
            case "survivors":
                confirmation = self._session.confirm(message.survivors.device_ids)
                return pb.SessionRequest(
                    confirmation=wire.confirmation_to_wire(self.round_id, confirmation)
                )
            case "confirmations":
                confirmations = [
                    wire.confirmation_from_wire(c) for c in message.confirmations.confirmations
                ]
                reveal = self._session.reveal(confirmations)
                return pb.SessionRequest(reveal=wire.reveal_to_wire(self.round_id, reveal))
            case other:
                raise PeerError(f"{other!r} is no step of a round")

    async def _send_update(self, message: pb.NeighbourShares) -> pb.SessionRequest:
        update = await self._trained()
        inbox = [wire.share_from_wire(share) for share in message.shares]
        delta = Layout.of(update.delta).flatten(update.delta)
        weight = min(update.num_examples, self._plan.max_weight)
        masked = await asyncio.to_thread(self._session.mask, inbox, delta, weight)
        digest = digest_of(masked)
        await self._upload(digest, masked)
        return pb.SessionRequest(
            masked_update=pb.MaskedUpdate(round_id=self.round_id, digest=digest, size=len(masked))
        )

    async def _trained(self) -> Update:
        """Wait for the update; training that could not fetch its model begins anew."""
        done = self._update.done() and not self._update.cancelled()
        if done and isinstance(self._update.exception(), UnreachableError):
            self._update = asyncio.create_task(self._train())
        return await asyncio.shield(self._update)

    async def _train(self) -> Update:
        with tempfile.TemporaryDirectory(prefix="minga-round-") as folder:
            path = Path(folder) / "model.safetensors"
            await self._download(self._model_digest, path)
            parameters = from_bytes(await asyncio.to_thread(path.read_bytes))
        layout = Layout.of(parameters)
        if layout.num_values != self._plan.num_values:
            raise PeerError(
                f"the model has {layout.num_values} values, the plan says {self._plan.num_values}"
            )
        start = time.perf_counter()
        update = await self._trainer.fit(parameters, self._training)
        self._metrics.training.observe(time.perf_counter() - start)
        if Layout.of(update.delta) != layout:
            raise TrainerError("the update has other tensors than the model")
        if update.num_examples < 1:
            raise TrainerError("the device has no examples to learn from")
        return update

    def _withdraw(self, reason: str) -> pb.SessionRequest:
        return wire.withdrawal(self.round_id, reason)
