"""The round's state machine, driven by real device sessions, without sockets or clocks."""

import numpy as np
import pytest

from minga.federation.coordinator import journal
from minga.federation.coordinator.rounds import (
    DeadlinePassed,
    DeviceLost,
    Finish,
    RoundFailed,
    Stage,
    SumComputed,
    TakePart,
    UpdateUploaded,
    open_round,
)
from minga.federation.errors import PeerError
from minga.federation.identity import Identity
from tests.federation.coordinator.table import Table, expected_mean, make_identities, weight_of

STAGES = [Stage.KEYS, Stage.SHARES, Stage.UPDATES, Stage.CONFIRM, Stage.UNMASK]


@pytest.fixture(scope="module")
def identities(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """Six devices of one authority."""
    return make_identities(tmp_path_factory.mktemp("authority"), 6)


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
    # Another device in it would make 1e-2; rounding may move a value by one level now and then.
    np.testing.assert_allclose(mean, expected_mean(counted), atol=1e-4)


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
