"""Devices whose sums tell exactly who is in them.

The example counts are powers of two: a round's total weight, which comes out of the masked sum
itself, is the set of the devices in it, each once. The updates are whole numbers of fixed-point
levels that weighing keeps whole, so rounding is left out and a model is compared bit by bit.
"""

import numpy as np

from minga.federation.parameters import Parameters, from_bytes
from minga.federation.trainer import Scalar
from minga.federation.v1 import federation_pb2 as pb
from tests.federation.fleet import Fleet, campaign_plan, toy_model

WEIGHTS = {f"site-{index}": 2**index for index in range(5)}
"""Device -> how many examples it claims to have."""

UNITS = dict(zip(WEIGHTS, (1009, -499, 251, -127, 61), strict=True))
"""Device -> its update, in levels for each example."""

_MAX_WEIGHT = max(WEIGHTS.values())
_LEVEL = 2.0**-15
_MAX_LEVEL = 2**15 - 1  # of 16 bits
_CLIP = _MAX_LEVEL * _LEVEL


def exact_options(name: str, **more: Scalar) -> dict[str, Scalar]:
    """Give what a device's constant trainer is made with."""
    step = UNITS[name] * _MAX_WEIGHT * _LEVEL
    return {"step": step, "num_examples": WEIGHTS[name], **more}


def exact_plan(**changes: object) -> pb.CampaignPlan:
    """Give a plan over all these devices, of which two may be lost."""
    values = {
        "cohort": len(WEIGHTS),
        "expected_dropout": 0.2,
        "clip": _CLIP,
        "max_weight": _MAX_WEIGHT,
        "value_bits": 16,
    }
    return campaign_plan(**{**values, **changes})


def moved(value: np.ndarray, rounds: list[pb.Round]) -> np.ndarray:
    """Compute what becomes of a value over some rounds, with the coordinator's own rounding."""
    for round_ in rounds:
        weight = sum(WEIGHTS[name] for name in round_.survivors)
        levels = sum(WEIGHTS[name] * UNITS[name] for name in round_.survivors)
        mean = np.float32(levels * (_CLIP / _MAX_LEVEL * _MAX_WEIGHT / weight))
        value = (value.astype(np.float64) + np.float64(mean)).astype(np.float32)
    return value


async def assert_exact(
    fleet: Fleet, campaign: pb.Campaign, model: Parameters | None = None
) -> None:
    """Check that the rounds of a fleet's only campaign hold each of their survivors exactly once.

    That is: their total weights, the model, and how often the coordinator says each one counted.
    """
    counted = await assert_sums_exact(fleet, campaign, model)
    devices = {d.device_id: d.rounds_counted for d in await fleet.operator.devices()}
    assert {name: devices.get(name, 0) for name in WEIGHTS} == counted


async def assert_sums_exact(
    fleet: Fleet, campaign: pb.Campaign, model: Parameters | None = None
) -> dict[str, int]:
    """Check the total weights and the model of a campaign; gives how often each device counted."""
    assert campaign.state == pb.CAMPAIGN_STATE_COMPLETED, campaign.reason
    committed = [r for r in campaign.rounds if r.stage == pb.ROUND_STAGE_COMMITTED]
    assert [r.number for r in committed] == list(range(1, campaign.plan.num_rounds + 1))
    counted = dict.fromkeys(WEIGHTS, 0)
    for round_ in committed:
        assert round_.total_weight == sum(WEIGHTS[name] for name in round_.survivors), round_
        for name in round_.survivors:
            counted[name] += 1
    result = from_bytes(await fleet.operator.read(campaign.model_digest))
    for name, value in (model or toy_model()).items():
        np.testing.assert_array_equal(result[name], moved(value, committed))
    return counted
