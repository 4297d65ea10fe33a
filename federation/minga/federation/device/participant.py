"""This device's part in one round.

Holds the round's secrets and the update, in memory alone, until the round ends. Training starts
with the invitation and runs while keys and shares are exchanged. The coordinator may ask for a step
again after a broken link or a restart; the answer is then the same as before.
"""

import asyncio
import logging
import tempfile
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minga.federation import wire
from minga.federation.aggregation.privacy import assured_multiplier, clip_length
from minga.federation.analytics import Question
from minga.federation.device.keepsakes import Keepsakes
from minga.federation.device.learning import LocalLearning
from minga.federation.device.metrics import Metrics
from minga.federation.device.queries import NO_QUERIES, Queries
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.errors import (
    AccessError,
    FederationError,
    IneligibleError,
    NoiseRefusedError,
    PeerError,
    PlainRefusedError,
    TrainerError,
    UnreachableError,
)
from minga.federation.identity import CertificateVerifier, Identity
from minga.federation.limits import NOISE_COLLUDER_SHARE
from minga.federation.parameters import Layout, read_layout
from minga.federation.plain import PlainPlan, update_to_bytes
from minga.federation.secagg.device import DeviceSession
from minga.federation.secagg.fixedpoint import encode_update
from minga.federation.secagg.plan import RoundPlan
from minga.federation.transfer import digest_of
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Evaluation, Training

_log = logging.getLogger(__name__)

Upload = Callable[[bytes, bytes | memoryview], Awaitable[None]]
"""Sends bytes under their digest, resuming by itself."""

Contribution = tuple[NDArray[np.float32], int]
"""A device's vector, shape `(num_values,)`, and how much it counts."""

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
        keepsakes: Keepsakes | None = None,
        allow_plain: bool = False,
        min_noise: float = 0.0,
        queries: Queries = NO_QUERIES,
    ) -> None:
        """Begin with what the round asks.

        Raises:
            ValueError, PeerError: the invitation is not safe to follow, or malformed.
            PlainRefusedError: the coordinator would see the update, and this site does not allow
                that.
            NoiseRefusedError: not even the whole cohort would make as much noise as this site
                wants.
            QueryRefusedError: this site does not let be told what is asked.
        """
        self.round_id = invite.round_id
        self._model_digest = invite.model_digest
        self._min_examples = invite.min_examples
        self._asked = wire.work_of_invite(invite)
        self._plan = wire.plan_of_invite(invite)
        self._encoding = wire.encoding_of_invite(invite)
        self._queries = queries
        self._min_noise = min_noise
        self._require_noise(self._plan.max_cohort if isinstance(self._plan, RoundPlan) else 1)
        if isinstance(self._asked, Question):
            queries.require_allowed(self._asked, self._plan)
        self._session: DeviceSession | None = None
        if isinstance(self._plan, RoundPlan):
            verifier = CertificateVerifier(authority=identity.issuer)
            self._session = DeviceSession(self._plan, identity, verifier)
        elif not allow_plain:
            raise PlainRefusedError(
                "the coordinator would see this device's update; its owner has to allow that "
                "(allow_plain)"
            )
        self._trainer = trainer
        self._learning = LocalLearning(
            trainer=trainer,
            keepsakes=keepsakes,
            method=wire.method_of(invite),
            config=wire.config_from_wire(invite.training),
            round_id=self.round_id,
            campaign_id=invite.campaign_id,
            model_name=invite.model_name,
            clip=control_clip(self._plan),
            metrics=metrics,
        )
        self._download = download
        self._upload = upload
        self._sent = b""  # the digest of the update that the coordinator has
        self._turn = asyncio.Lock()
        self._result = asyncio.create_task(self._work())

    def close(self) -> asyncio.Task[Contribution]:
        """Forget the round; work that still runs is stopped.

        Returns:
            The work, which may take a moment to end.
        """
        self._result.cancel()
        return self._result

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
        session = self._session
        if message.WhichOneof("body") == "invite":
            await self._require_examples()
        if session is None:
            return await self._send_plain(message)
        match message.WhichOneof("body"):
            case "invite":
                advert = session.advertise()
                return pb.SessionRequest(key_advert=wire.advert_to_wire(self.round_id, advert))
            case "neighbour_keys":
                adverts = [wire.advert_from_wire(a) for a in message.neighbour_keys.adverts]
                shares = session.share(adverts)
                return pb.SessionRequest(shares=wire.shares_to_wire(self.round_id, shares))
            case "neighbour_shares":
                return await self._send_masked(session, message.neighbour_shares)
            case "survivors":
                num_summed = len(message.survivors.device_ids)
                self._require_noise(num_summed)
                if isinstance(self._asked, Question):
                    self._queries.require_hidden(num_summed)
                confirmation = session.confirm(message.survivors.device_ids)
                return pb.SessionRequest(
                    confirmation=wire.confirmation_to_wire(self.round_id, confirmation)
                )
            case "confirmations":
                confirmations = [
                    wire.confirmation_from_wire(c) for c in message.confirmations.confirmations
                ]
                reveal = session.reveal(confirmations)
                return pb.SessionRequest(reveal=wire.reveal_to_wire(self.round_id, reveal))
            case other:
                raise PeerError(f"{other!r} is no step of a round")

    async def _send_masked(
        self, session: DeviceSession, message: pb.NeighbourShares
    ) -> pb.SessionRequest:
        delta, weight = await self._contribution()
        inbox = [wire.share_from_wire(share) for share in message.shares]
        encode = encode_update if self._encoding is None else self._encoding.encode
        digest, size = await self._put(partial(session.mask, inbox, delta, weight, encode))
        return pb.SessionRequest(
            masked_update=pb.MaskedUpdate(round_id=self.round_id, digest=digest, size=size)
        )

    async def _send_plain(self, message: pb.SessionResponse) -> pb.SessionRequest:
        if message.WhichOneof("body") != "invite":
            raise PeerError(f"{message.WhichOneof('body')!r} is no step of a plain round")
        delta, weight = await self._contribution()
        if self._encoding is not None:
            delta, _ = clip_length(delta, self._encoding.max_norm)
        digest, size = await self._put(partial(update_to_bytes, delta))
        return pb.SessionRequest(
            plain_update=pb.PlainUpdate(
                round_id=self.round_id, digest=digest, size=size, num_examples=weight
            )
        )

    async def _put(self, make: Callable[[], bytes | memoryview]) -> tuple[bytes, int]:
        """Make an update off the loop, upload it, and give its digest and size.

        Asked once more, after a reconnect, for what it took meanwhile, the coordinator expects no
        upload any more.
        """
        data, digest = await asyncio.to_thread(_with_digest, make)
        try:
            await self._upload(digest, data)
        except AccessError:
            if digest != self._sent:
                raise
        self._sent = digest
        return digest, len(data)

    async def _contribution(self) -> Contribution:
        """Wait for the work's result; work that could not fetch its model begins anew."""
        done = self._result.done() and not self._result.cancelled()
        if done and isinstance(self._result.exception(), UnreachableError):
            self._result = asyncio.create_task(self._work())
        return await asyncio.shield(self._result)

    async def _work(self) -> Contribution:
        """Do what the round asks, and give a vector and how much it counts."""
        if isinstance(self._asked, Question):
            return await self._tell(self._asked)
        with tempfile.TemporaryDirectory(prefix="minga-round-") as folder:
            model = Path(folder) / "model.safetensors"
            layout = await self._fetch(model)
            match self._asked:
                case Evaluation():
                    vector, weight = await self._learning.evaluate(self._asked, model)
                case Training():
                    vector, weight = await self._learning.train(model, layout)
                    self._require_count(weight)
        return vector, min(weight, self._plan.max_weight)

    async def _tell(self, question: Question) -> Contribution:
        """Answer a question about this site's data."""
        vector, num_rows = await self._trainer.answer(question)
        if vector.shape != (self._plan.num_values,):
            raise PeerError(
                f"the question takes {vector.size} values, the plan says {self._plan.num_values}"
            )
        return vector, min(num_rows, self._plan.max_weight)

    async def _fetch(self, path: Path) -> Layout:
        """Fetch the model into a file, and give its layout."""
        await self._download(self._model_digest, path)
        layout = await asyncio.to_thread(read_layout, path)
        length = self._asked.num_values(layout.num_values)
        if self._encoding is not None:
            length += self._encoding.num_bits
        if length != self._plan.num_values:
            raise PeerError(
                f"the round takes {length} values, the plan says {self._plan.num_values}"
            )
        return layout

    def _require_noise(self, num_summed: int) -> None:
        """Refuse to train for a sum with too little noise, before anything of it is unmasked.

        Raises:
            NoiseRefusedError: there is too little.
        """
        if not self._min_noise or not isinstance(self._asked, Training):
            return
        assured = 0.0
        if isinstance(self._plan, RoundPlan) and self._encoding is not None:
            assured = assured_multiplier(
                plan=self._plan,
                encoding=self._encoding,
                num_devices=num_summed,
                colluder_share=NOISE_COLLUDER_SHARE,
            )
        if assured < self._min_noise:
            raise NoiseRefusedError(
                f"{num_summed} devices assure a noise multiplier of {assured:.3g}; this device's "
                f"owner wants {self._min_noise:g} or more"
            )

    async def _require_examples(self) -> None:
        """Leave before others count on this device, if its trainer knows its count beforehand."""
        if self._min_examples > 1:
            count = await self._trainer.num_examples()
            if count is not None:
                self._require_count(count)

    def _require_count(self, num_examples: int) -> None:
        if num_examples < self._min_examples:  # how many there are is nobody's business
            raise IneligibleError("the campaign asks for more examples")

    def _withdraw(self, reason: str) -> pb.SessionRequest:
        return wire.withdrawal(self.round_id, reason)


def _with_digest(make: Callable[[], bytes | memoryview]) -> tuple[bytes | memoryview, bytes]:
    data = make()
    return data, digest_of(data)


def control_clip(plan: RoundPlan | PlainPlan) -> float | None:
    """Say how far masking lets a coordinate go; after a rotation that is none of the update's."""
    return plan.clip if isinstance(plan, RoundPlan) and not plan.rotate else None
