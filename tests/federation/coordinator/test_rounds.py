"""The round's state machine, driven by real device sessions, without sockets or clocks."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from minga.federation.coordinator import journal
from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.rounds import (
    ConfirmSurvivors,
    DeadlinePassed,
    DeviceLost,
    Event,
    Finish,
    KeysAdvertised,
    RevealShares,
    RoundFailed,
    RoundOrder,
    SendUpdate,
    ShareSecrets,
    SharesRevealed,
    SharesSent,
    Stage,
    SumComputed,
    SurvivorsConfirmed,
    TakePart,
    Timeouts,
    UpdateUploaded,
    open_round,
)
from minga.federation.errors import PeerError
from minga.federation.identity import CertificateVerifier, Identity, Role, make_csr, new_key
from minga.federation.secagg.coordinator import MaskedSum, unmask
from minga.federation.secagg.device import DeviceSession
from minga.federation.secagg.plan import context_digest, derive_plan

NUM_VALUES = 50
MODEL = bytes(32)
STAGES = [Stage.KEYS, Stage.SHARES, Stage.UPDATES, Stage.CONFIRM, Stage.UNMASK]


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """Six devices of one authority."""
    folder: Path = tmp_path_factory.mktemp("authority")
    authority = Authority.open(folder)
    devices = {}
    for name in (f"site-{index}" for index in range(6)):
        key = new_key()
        certificate = authority.issue_client(Role.DEVICE, name, make_csr(key, name))
        devices[name] = Identity.of(key, certificate, authority.certificate)
    return devices


class Table:
    """A round and its devices around one table; `silent` devices never answer again."""

    def __init__(self, identities: dict[str, Identity], min_cohort: int = 3) -> None:
        plan = derive_plan(
            round_id=bytes(range(16)),
            context_digest=context_digest(MODEL, {}),
            num_values=NUM_VALUES,
            cohort_size=len(identities),
            clip=1.0,
            value_bits=16,
            max_weight=10,
            expected_dropout=0.34,
            colluder_share=0.0,
        )
        self.order = RoundOrder(
            round_id=plan.round_id.hex(),
            number=1,
            plan=plan,
            invited=tuple(identities),
            min_cohort=min_cohort,
            goal=len(identities),
            model_digest=MODEL,
            training={},
            timeouts=Timeouts(keys_s=10, stage_s=10, updates_s=100),
        )
        self.round = open_round(self.order, 0.0)
        self.sessions = {
            name: DeviceSession(plan, identity, CertificateVerifier(authority=identity.authority))
            for name, identity in identities.items()
        }
        self.silent: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.log: list[Event] = []
        self.now = 0.0

    def take(self, event: Event) -> bool:
        self.now += 1.0
        self.log.append(event)
        return self.round.apply(event, self.now)

    def answer(self, name: str) -> Event | None:
        """Let one device do what it is told."""
        session = self.sessions[name]
        match self.round.instruction(name):
            case TakePart():
                return KeysAdvertised(device_id=name, advert=session.advertise())
            case ShareSecrets(adverts=adverts):
                return SharesSent(device_id=name, shares=session.share(adverts))
            case SendUpdate(shares=shares):
                self.uploads[name] = session.mask(shares, delta_of(name), weight_of(name))
                return UpdateUploaded(
                    device_id=name, digest=name.encode(), size=len(self.uploads[name])
                )
            case ConfirmSurvivors(survivors=survivors):
                return SurvivorsConfirmed(device_id=name, confirmation=session.confirm(survivors))
            case RevealShares(confirmations=confirmations):
                return SharesRevealed(device_id=name, reveal=session.reveal(confirmations))
            case _:
                return None

    def play(self, until: Stage, lose: Callable[[Stage], Iterable[str]] = lambda stage: ()) -> None:
        """Let all devices answer, stage by stage; some fall silent at the start of a stage."""
        while self.round.stage is not until and not self.round.stage.ended:
            stage = self.round.stage
            self.silent.update(lose(stage))
            for name in self.order.invited:
                if name not in self.silent and (event := self.answer(name)) is not None:
                    self.take(event)
            if self.round.stage is stage:
                self.take(DeadlinePassed(stage=stage))

    def sum(self) -> tuple[np.ndarray, int]:
        """Unmask what was uploaded."""
        masked = MaskedSum(self.order.plan)
        for name in self.round.survivors:
            masked.add(self.uploads[name])
        result = unmask(
            plan=self.order.plan,
            graph=self.round.graph,
            adverts=self.round.adverts,
            sharers=self.round.sharers,
            survivors=self.round.survivors,
            reveals=self.round.reveals,
            masked_sum=masked,
        )
        return result.mean_delta, result.total_weight


def weight_of(name: str) -> int:
    return 10 if name.endswith(("0", "2", "4")) else 5


def delta_of(name: str) -> np.ndarray:
    """An update that fixed point holds exactly also after weighting by a half."""
    level = 2 * (int(name[-1]) - 2) * 1000
    return np.full(NUM_VALUES, level / (2**15 - 1), np.float32)


def expected_mean(names: Iterable[str]) -> float:
    weights = {name: weight_of(name) for name in names}
    total = sum(weights.values())
    return sum(float(delta_of(name)[0]) * weight for name, weight in weights.items()) / total


@pytest.mark.parametrize("stage", STAGES)
def test_two_devices_lost_at_a_stage(identities: dict[str, Identity], stage: Stage) -> None:
    """Whenever two of six devices vanish, the sum is exactly that of the counted ones."""
    table = Table(identities)
    table.play(Stage.AGGREGATE, lambda now: ("site-1", "site-4") if now is stage else ())
    assert table.round.stage is Stage.AGGREGATE, table.round.reason
    counted = set(identities) - (
        {"site-1", "site-4"} if stage.value <= Stage.UPDATES.value else set()
    )
    assert set(table.round.survivors) == counted
    mean, weight = table.sum()
    assert weight == sum(weight_of(name) for name in counted)
    np.testing.assert_allclose(mean, expected_mean(counted), atol=1e-7)


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_lost_at_a_stage(identities: dict[str, Identity], stage: Stage) -> None:
    """When too few are left the round aborts with the stage and the numbers."""
    table = Table(identities)
    lost = ("site-0", "site-1", "site-2", "site-3")
    table.play(Stage.AGGREGATE, lambda now: lost if now is stage else ())
    assert table.round.stage is Stage.ABORTED
    assert table.round.ended_at is not None
    assert stage.name in table.round.reason or "unmask" in table.round.reason


def test_replay_gives_the_same_round(identities: dict[str, Identity]) -> None:
    """Writing the events down and reading them back rebuilds the state, at every point."""
    table = Table(identities)
    table.play(Stage.AGGREGATE, lambda now: ("site-5",) if now is Stage.UPDATES else ())
    table.take(SumComputed(model_digest=bytes(32), total_weight=40))
    for length in range(len(table.log) + 1):
        first = open_round(table.order, 0.0)
        rows = []
        for index, event in enumerate(table.log[:length]):
            first.apply(event, float(index))
            rows.append(journal.encode(table.order.round_id, event, float(index)))
        assert journal.replay(table.order, 0.0, rows) == first


def test_looking_at_an_event_changes_nothing(identities: dict[str, Identity]) -> None:
    """Whether an event would change the state can be asked before it is applied."""
    table = Table(identities)
    table.play(Stage.AGGREGATE, lambda now: ("site-5",) if now is Stage.UPDATES else ())
    table.take(SumComputed(model_digest=bytes(32), total_weight=40))
    first, second = (open_round(table.order, 0.0) for _ in range(2))
    for at, event in enumerate(table.log):
        would_change = first.changed_by(event)
        assert first == second
        assert first.apply(event, float(at)) is would_change
        second.apply(event, float(at))


def test_repetition_changes_nothing(identities: dict[str, Identity]) -> None:
    """The same answer twice is taken once, at any time; a different one is refused."""
    table = Table(identities)
    table.play(Stage.AGGREGATE)
    answers = [event for event in table.log if not isinstance(event, DeadlinePassed)]
    assert not any(table.round.apply(event, 99.0) for event in answers)
    update = next(event for event in answers if isinstance(event, UpdateUploaded))
    other = UpdateUploaded(device_id=update.device_id, digest=b"other", size=update.size)
    with pytest.raises(PeerError, match="twice"):
        table.round.apply(other, 99.0)


def test_strangers_and_latecomers(identities: dict[str, Identity]) -> None:
    """Answers of devices that are not in the stage are refused; nothing changes."""
    table = Table(identities)
    late = table.answer("site-0")
    assert late is not None
    table.silent.add("site-0")
    table.play(Stage.UPDATES)
    with pytest.raises(PeerError, match="left this round"):
        table.round.apply(late, 50.0)
    stranger = UpdateUploaded(device_id="site-9", digest=b"x", size=table.order.plan.upload_size)
    with pytest.raises(PeerError, match="not in stage"):
        table.round.apply(stranger, 50.0)
    wrong_size = UpdateUploaded(device_id="site-1", digest=b"x", size=3)
    with pytest.raises(PeerError, match="3 bytes"):
        table.round.apply(wrong_size, 50.0)


def test_instructions_follow_the_state(identities: dict[str, Identity]) -> None:
    """A device is told its step until it has answered, then to wait, at last how it ended."""
    table = Table(identities)
    assert isinstance(table.round.instruction("site-0"), TakePart)
    event = table.answer("site-0")
    assert event is not None
    table.take(event)
    assert table.round.instruction("site-0") is None
    assert table.round.instruction("site-9") is None
    table.play(Stage.AGGREGATE)
    table.take(SumComputed(model_digest=bytes(32), total_weight=1))
    assert table.round.instruction("site-0") == Finish(committed=True, counted=True, reason="")


def test_lost_device_is_told_at_once_or_at_the_end(identities: dict[str, Identity]) -> None:
    """Who is not in the sum hears so at once; who is in it hears how the round ended."""
    table = Table(identities)
    table.play(Stage.UPDATES)
    table.take(DeviceLost(device_id="site-0", reason="battery"))
    assert table.round.instruction("site-0") == Finish(
        committed=False, counted=False, reason="battery"
    )
    table.play(Stage.CONFIRM)
    table.take(DeviceLost(device_id="site-1", reason="link"))
    assert table.round.instruction("site-1") is None
    table.take(RoundFailed(reason="cancelled"))
    finish = table.round.instruction("site-1")
    assert finish == Finish(committed=False, counted=False, reason="link")


def test_deadlines(identities: dict[str, Identity]) -> None:
    """A stage's deadline counts from its own start; an old deadline does nothing."""
    table = Table(identities)
    assert table.round.deadline() == 10.0
    table.play(Stage.UPDATES)
    assert table.round.deadline() == table.now + 100.0
    assert not table.round.apply(DeadlinePassed(stage=Stage.KEYS), 500.0)
    table.play(Stage.AGGREGATE)
    assert table.round.deadline() is None


def test_deadline_after_a_restart(identities: dict[str, Identity]) -> None:
    """A stage during which the coordinator was away has all its time again."""
    table = Table(identities)
    table.play(Stage.UPDATES)
    assert table.round.deadline(not_before=5000.0) == 5100.0
    assert table.round.deadline(not_before=table.now - 1) == table.now + 100.0
