"""Protobuf messages <-> the dataclasses that the rest of the federation speaks.

Everything that comes from the other side is converted here once; what has a wrong form raises
`PeerError` here, so that no other module handles a malformed message.
"""

from minga.federation.wire.plans import (
    evaluation_of,
    is_plain,
    num_groups,
    optimizer_from_wire,
    optimizer_to_wire,
    plan_of_invite,
    plan_to_wire,
    requirements_from_wire,
    requirements_to_wire,
    round_plan,
)
from minga.federation.wire.rounds import (
    event_from_wire,
    event_to_wire,
    instruction_to_wire,
    invite_to_wire,
    round_end,
    round_of,
    round_to_wire,
    unknown_round,
    withdrawal,
    without_names,
)
from minga.federation.wire.secagg import (
    advert_from_wire,
    advert_to_wire,
    confirmation_from_wire,
    confirmation_to_wire,
    reveal_from_wire,
    reveal_to_wire,
    share_from_wire,
    share_to_wire,
    shares_to_wire,
)
from minga.federation.wire.values import (
    check_model,
    condition_from_wire,
    condition_to_wire,
    config_from_wire,
    config_to_wire,
    model_report,
    printable,
    timestamp,
)
from minga.federation.wire.work import evaluation_to_wire, work_of_invite

__all__ = [
    "advert_from_wire",
    "advert_to_wire",
    "check_model",
    "condition_from_wire",
    "condition_to_wire",
    "config_from_wire",
    "config_to_wire",
    "confirmation_from_wire",
    "confirmation_to_wire",
    "evaluation_of",
    "evaluation_to_wire",
    "event_from_wire",
    "event_to_wire",
    "instruction_to_wire",
    "invite_to_wire",
    "is_plain",
    "model_report",
    "num_groups",
    "optimizer_from_wire",
    "optimizer_to_wire",
    "plan_of_invite",
    "plan_to_wire",
    "printable",
    "requirements_from_wire",
    "requirements_to_wire",
    "reveal_from_wire",
    "reveal_to_wire",
    "round_end",
    "round_of",
    "round_plan",
    "round_to_wire",
    "share_from_wire",
    "share_to_wire",
    "shares_to_wire",
    "timestamp",
    "unknown_round",
    "withdrawal",
    "without_names",
    "work_of_invite",
]
