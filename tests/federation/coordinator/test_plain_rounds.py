"""The machine of plain rounds: no sockets, no clocks, no arithmetic."""

import pytest

from minga.federation.coordinator import journal
from minga.federation.coordinator.rounds import (
    DeadlinePassed,
    DeviceLost,
    Event,
    Finish,
    KeysAdvertised,
    PlainUpdateUploaded,
    Round,
    RoundOrder,
    Stage,
    SumComputed,
    TakePart,
    Timeouts,
    UpdateUploaded,
    open_round,
)
from minga.federation.errors import PeerError
from minga.federation.plain import PlainPlan
from minga.federation.secagg.messages import Advert

PLAN = PlainPlan(num_values=5, max_weight=100)
DEVICES = tuple(f"site-{index}" for index in range(5))


def order_of(goal: int = 5, min_cohort: int = 3) -> RoundOrder:
    return RoundOrder(
        round_id="00" * 16,
        number=1,
        plan=PLAN,
        invited=DEVICES,
        min_cohort=min_cohort,
        goal=goal,
        model_digest=bytes(32),
        training={},
        timeouts=Timeouts(updates_s=100),
    )


def update_of(name: str, **changes: object) -> PlainUpdateUploaded:
    values = {"digest": name.encode(), "size": PLAN.upload_size, "num_examples": 10, **changes}
    return PlainUpdateUploaded(device_id=name, **values)  # type: ignore[arg-type]


def play(round_: Round, *events: Event) -> None:
    for at, event in enumerate(events):
        round_.apply(event, float(at))


def test_every_update_counts() -> None:
    """A round begins with training and is complete when all have answered or are lost."""
    round_ = open_round(order_of(), 0.0)
    assert round_.stage is Stage.UPDATES
    assert round_.instruction("site-0") == TakePart(order=round_.order)
    play(round_, *map(update_of, DEVICES[:4]))
    assert round_.stage is Stage.UPDATES
    assert round_.instruction("site-0") is None
    play(round_, DeviceLost(device_id="site-4", reason="revoked"))
    assert round_.stage is Stage.AGGREGATE
    play(round_, SumComputed(model_digest=bytes(32), total_weight=40))
    assert round_.stage is Stage.COMMITTED
    assert round_.cohort == round_.survivors == DEVICES[:4]
    assert round_.instruction("site-3") == Finish(committed=True, counted=True, reason="")
    assert round_.instruction("site-4") == Finish(committed=True, counted=False, reason="revoked")


def test_goal_ends_the_wait() -> None:
    """Of five invited devices the three fastest count; the others are told that it is over."""
    round_ = open_round(order_of(goal=3), 0.0)
    play(round_, *map(update_of, DEVICES[2:]))
    assert round_.stage is Stage.AGGREGATE
    assert round_.survivors == DEVICES[2:]
    finish = round_.instruction("site-0")
    assert isinstance(finish, Finish)
    assert "enough others were faster" in finish.reason
    with pytest.raises(PeerError, match="left this round"):
        round_.apply(update_of("site-0"), 9.0)


def test_deadline_with_and_without_enough() -> None:
    """At the deadline a round goes on with the minimum, and is aborted with fewer."""
    enough, few = open_round(order_of(), 0.0), open_round(order_of(), 0.0)
    play(enough, *map(update_of, DEVICES[:3]), DeadlinePassed(stage=Stage.UPDATES))
    assert enough.stage is Stage.AGGREGATE
    play(few, *map(update_of, DEVICES[:2]), DeadlinePassed(stage=Stage.UPDATES))
    assert few.stage is Stage.ABORTED
    assert "2 of 5 devices" in few.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 3}, "3 bytes, expected 20"),
        ({"num_examples": 0}, "0 examples"),
        ({"num_examples": 101}, "takes 1 to 100"),
    ],
)
def test_impossible_updates(changes: dict[str, object], reason: str) -> None:
    """An update of another size, or that counts for nothing or too much, is refused."""
    round_ = open_round(order_of(), 0.0)
    with pytest.raises(PeerError, match=reason):
        round_.apply(update_of("site-0", **changes), 1.0)
    assert not round_.updates


def test_answers_of_a_secure_round_are_refused() -> None:
    """Keys and masked updates have no place in a plain round."""
    round_ = open_round(order_of(), 0.0)
    advert = Advert(
        device_id="site-0",
        mask_key=bytes(32),
        share_key=bytes(32),
        self_seed_commitment=bytes(32),
        certificate=b"certificate",
        signature=b"signature",
    )
    for event in (
        KeysAdvertised(device_id="site-0", advert=advert),
        UpdateUploaded(device_id="site-0", digest=b"x", size=PLAN.upload_size),
    ):
        with pytest.raises(PeerError, match="as if this plain round were secure"):
            round_.apply(event, 1.0)


def test_rejected_updates_do_not_count() -> None:
    """A device whose update turned out to be unusable is lost, and told why."""
    round_ = open_round(order_of(), 0.0)
    play(round_, *map(update_of, DEVICES))
    rejected = (("site-1", "its update holds NaN or infinity"),)
    play(round_, SumComputed(model_digest=bytes(32), total_weight=40, rejected=rejected))
    assert "site-1" not in round_.survivors
    assert round_.instruction("site-1") == Finish(
        committed=True, counted=False, reason="its update holds NaN or infinity"
    )


def test_replay_gives_the_same_round() -> None:
    """Written down and read back, the events rebuild the state at every point."""
    events = [
        *map(update_of, DEVICES[:4]),
        DeadlinePassed(stage=Stage.UPDATES),
        SumComputed(model_digest=bytes(32), total_weight=30, rejected=(("site-0", "NaN"),)),
    ]
    for length in range(len(events) + 1):
        round_ = open_round(order_of(), 0.0)
        rows = []
        for at, event in enumerate(events[:length]):
            round_.apply(event, float(at))
            rows.append(journal.encode("00" * 16, event, float(at)))
        assert journal.replay(order_of(), 0.0, rows) == round_


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0)])
def test_impossible_plans(numbers: tuple[int, int]) -> None:
    """A plan without values or weights is refused where it is made."""
    with pytest.raises(PeerError, match="both are 1 or more"):
        PlainPlan(num_values=numbers[0], max_weight=numbers[1])
