"""A device gives nobody both secrets of a peer, however often, in whatever words it is asked.

A real agent against a coordinator that plays its peers too, all of them in league with it: they
sign any list of survivors. A peer shares two secrets in a round; a share of each would help to open
the peer's upload.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path

import grpc
import pytest

from minga.federation import wire
from minga.federation.device.agent import Agent
from minga.federation.device.link import Link
from minga.federation.device.metrics import Metrics
from minga.federation.device.slots import ModelSlots
from minga.federation.device.trainer_process import TrainerProcess
from minga.federation.identity import CertificateVerifier
from minga.federation.secagg import signing
from minga.federation.secagg.device import DeviceSession
from minga.federation.secagg.messages import Advert, EncryptedShare
from minga.federation.secagg.plan import RoundPlan
from minga.federation.v1 import federation_pb2 as pb
from minga.inference.repository import ModelRepository
from tests.federation.conftest import Issue, Serve
from tests.federation.device.test_agent import ScriptedCoordinator, Stream, invite_of
from tests.federation.fleet import TRAINERS

VICTIM, PEERS = "site-0", ("site-1", "site-2")
EVERYBODY = [VICTIM, *PEERS]


class Conspiracy(ScriptedCoordinator):
    """A coordinator with two peers of the device in its hand."""

    def __init__(self, issue: Issue) -> None:
        super().__init__()
        self.invite = invite_of(1)
        plan = wire.plan_of_invite(self.invite)
        assert isinstance(plan, RoundPlan)
        self.plan = plan
        self.identities = {name: issue(name) for name in PEERS}
        self.sessions = {
            name: DeviceSession(plan, one, CertificateVerifier(authority=one.authority))
            for name, one in self.identities.items()
        }
        self.adverts = {name: session.advertise() for name, session in self.sessions.items()}
        self.inbox: list[EncryptedShare] = []
        self.given: dict[str, set[str]] = {name: set() for name in PEERS}

    async def Upload(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UploadRequest], context: grpc.aio.ServicerContext
    ) -> pb.UploadResponse:
        await context.send_initial_metadata(())
        parts = [part async for part in request_iterator]
        return pb.UploadResponse(size=parts[0].header.size)

    async def GetUploadOffset(  # noqa: N802
        self, request: pb.GetUploadOffsetRequest, context: object
    ) -> pb.GetUploadOffsetResponse:
        return pb.GetUploadOffsetResponse(offset=0)

    async def reconnect(self, stream: Stream | None = None) -> Stream:
        """Hang up and wait for the device to come back."""
        if stream is not None:
            stream.say(None)
        return (await self.stream())[0]

    async def ask(self, stream: Stream, **body: object) -> pb.SessionRequest:
        """Ask for something, and note what is revealed."""
        stream.say(pb.SessionResponse(**body))  # type: ignore[arg-type]
        answer = await stream.hear()
        for share in answer.reveal.self_seed_shares:
            self.given[share.peer].add("seed")
        for share in answer.reveal.mask_key_shares:
            self.given[share.peer].add("key")
        return answer

    # -- the steps, as the protocol has them --

    def keys(self) -> pb.NeighbourKeys:
        adverts = [wire.advert_to_wire(self.invite.round_id, a) for a in self.adverts.values()]
        return pb.NeighbourKeys(round_id=self.invite.round_id, adverts=adverts)

    def shares(self) -> pb.NeighbourShares:
        shares = [wire.share_to_wire(share) for share in self.inbox]
        return pb.NeighbourShares(round_id=self.invite.round_id, shares=shares)

    def survivors(self, *names: str) -> pb.Survivors:
        return pb.Survivors(round_id=self.invite.round_id, device_ids=names)

    def confirmations(self, *names: str) -> pb.Confirmations:
        """Let the peers sign a list of survivors; they sign everything."""
        signed = [
            signing.sign_survivors(self.plan, identity, names)
            for identity in self.identities.values()
        ]
        messages = [wire.confirmation_to_wire(self.invite.round_id, one) for one in signed]
        return pb.Confirmations(round_id=self.invite.round_id, confirmations=messages)

    def share_with(self, victim: Advert) -> None:
        """Let the peers share their secrets with the device."""
        for name, session in self.sessions.items():
            others = [advert for peer, advert in self.adverts.items() if peer != name]
            made = session.share([victim, *others])
            self.inbox += [share for share in made if share.receiver == VICTIM]

    async def run_until_revealed(self, stream: Stream) -> bytes:
        """Go through a round as an honest coordinator would; gives the reveal's bytes."""
        answer = await self.ask(stream, invite=self.invite)
        self.victim = wire.advert_from_wire(answer.key_advert)
        self.share_with(self.victim)
        assert (await self.ask(stream, neighbour_keys=self.keys())).HasField("shares")
        assert (await self.ask(stream, neighbour_shares=self.shares())).HasField("masked_update")
        await self.ask(stream, survivors=self.survivors(*EVERYBODY))
        answer = await self.ask(stream, confirmations=self.confirmations(*EVERYBODY))
        assert self.given == {name: {"seed"} for name in PEERS}
        return answer.reveal.SerializeToString(deterministic=True)


@pytest.fixture
async def conspiracy(
    serve: Serve, issue: Issue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Conspiracy]:
    """The conspirators, and a device that trains and dials them."""
    monkeypatch.setenv("PYTHONPATH", str(TRAINERS))
    coordinator = Conspiracy(issue)
    address = await serve(coordinator.add_services)
    agent = Agent(
        link=Link(address, issue(VICTIM), keep=lambda identity: None),
        trainer=TrainerProcess("constant_trainer:make", {"step": 0.5}),
        slots=ModelSlots(tmp_path / "models"),
        models=ModelRepository(),
        metrics=Metrics(),
    )
    task = asyncio.create_task(agent.run())
    yield coordinator
    task.cancel()
    await asyncio.wait([task])


async def test_asked_again_in_the_same_words(conspiracy: Conspiracy) -> None:
    """After a reconnect the same questions get the same bytes."""
    stream = await conspiracy.reconnect()
    first = await conspiracy.run_until_revealed(stream)
    stream = await conspiracy.reconnect(stream)
    await conspiracy.ask(stream, survivors=conspiracy.survivors(*EVERYBODY))
    signed = conspiracy.confirmations(*EVERYBODY)
    again = await conspiracy.ask(stream, confirmations=signed)
    assert again.reveal.SerializeToString(deterministic=True) == first


Trick = Callable[[Conspiracy, Stream], Coroutine[None, None, None]]


async def other_survivors(conspiracy: Conspiracy, stream: Stream) -> None:
    """Say after a reconnect that a peer dropped out after all."""
    stream = await conspiracy.reconnect(stream)
    shorter = [name for name in EVERYBODY if name != PEERS[0]]
    answer = await conspiracy.ask(stream, survivors=conspiracy.survivors(*shorter))
    assert "EquivocationError" in answer.withdrawal.reason
    stream = await conspiracy.reconnect(stream)
    signed = conspiracy.confirmations(*shorter)
    assert (await conspiracy.ask(stream, confirmations=signed)).HasField("withdrawal")


async def other_confirmations(conspiracy: Conspiracy, stream: Stream) -> None:
    """Bring signatures under another list without naming it."""
    signed = conspiracy.confirmations(VICTIM, PEERS[1])
    answer = await conspiracy.ask(stream, confirmations=signed)
    assert {share.peer for share in answer.reveal.self_seed_shares} == set(PEERS)
    assert not answer.reveal.mask_key_shares


async def the_same_round_again(conspiracy: Conspiracy, stream: Stream) -> None:
    """Make the device forget the round, invite it to the same one, and play back old shares.

    It makes new keys, so nothing that was sealed for the old ones opens.
    """
    end = pb.RoundEnd(round_id=conspiracy.invite.round_id)
    stream.say(pb.SessionResponse(round_end=end))
    answer = await conspiracy.ask(stream, invite=conspiracy.invite)
    new_keys = {answer.key_advert.share_key, answer.key_advert.mask_key}
    assert not new_keys & {conspiracy.victim.share_key, conspiracy.victim.mask_key}
    await conspiracy.ask(stream, neighbour_keys=conspiracy.keys())
    answer = await conspiracy.ask(stream, neighbour_shares=conspiracy.shares())
    assert answer.HasField("masked_update")
    await conspiracy.ask(stream, survivors=conspiracy.survivors(*EVERYBODY))
    signed = conspiracy.confirmations(*EVERYBODY)
    answer = await conspiracy.ask(stream, confirmations=signed)
    assert answer.HasField("reveal")
    assert not answer.reveal.self_seed_shares
    assert not answer.reveal.mask_key_shares


@pytest.mark.parametrize(
    "trick", [other_survivors, other_confirmations, the_same_round_again], ids=lambda f: f.__name__
)
async def test_asked_again_in_other_words(conspiracy: Conspiracy, trick: Trick) -> None:
    """No trick brings a share of the other secret of a peer, though all its peers help."""
    stream = await conspiracy.reconnect()
    await conspiracy.run_until_revealed(stream)
    await trick(conspiracy, stream)
    assert conspiracy.given == {name: {"seed"} for name in PEERS}
