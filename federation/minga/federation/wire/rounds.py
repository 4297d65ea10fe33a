"""What devices and the coordinator say to each other in a round, and the record of it."""

import re

from minga.federation.coordinator import rounds
from minga.federation.errors import PeerError
from minga.federation.limits import MAX_REASON_CHARS
from minga.federation.plain import PlainPlan
from minga.federation.secagg.plan import RoundPlan
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.wire.aggregation import encoding_to_wire
from minga.federation.wire.plans import plain_plan_to_wire, plan_to_wire
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
from minga.federation.wire.values import config_to_wire, printable, timestamp
from minga.federation.wire.work import kind_of_work, put_work

_ROUND_ID = re.compile(r"[0-9a-f]{32}")

# --- what devices say ---


def withdrawal(round_id: str, reason: str) -> pb.SessionRequest:
    """Say that a device leaves a round."""
    return pb.SessionRequest(
        withdrawal=pb.RoundWithdrawal(round_id=round_id, reason=reason[:MAX_REASON_CHARS])
    )


def event_from_wire(device_id: str, request: pb.SessionRequest) -> tuple[str, rounds.DeviceEvent]:
    """Read a device's answer: the round that it names, and the event.

    Raises:
        PeerError: the message is no answer to a round, or malformed.
    """
    kind = request.WhichOneof("body")
    body = getattr(request, kind) if kind else None
    event: rounds.DeviceEvent
    match body:
        case pb.KeyAdvert():
            event = rounds.KeysAdvertised(device_id=device_id, advert=advert_from_wire(body))
        case pb.SharesUpload():
            shares = tuple(share_from_wire(share) for share in body.shares)
            event = rounds.SharesSent(device_id=device_id, shares=shares)
        case pb.MaskedUpdate():
            event = rounds.UpdateUploaded(device_id=device_id, digest=body.digest, size=body.size)
        case pb.PlainUpdate():
            event = rounds.PlainUpdateUploaded(
                device_id=device_id,
                digest=body.digest,
                size=body.size,
                num_examples=body.num_examples,
            )
        case pb.SurvivorConfirmation():
            event = rounds.SurvivorsConfirmed(
                device_id=device_id, confirmation=confirmation_from_wire(body)
            )
        case pb.ShareReveal():
            event = rounds.SharesRevealed(
                device_id=device_id, reveal=reveal_from_wire(device_id, body)
            )
        case pb.RoundWithdrawal():
            event = rounds.DeviceLost(device_id=device_id, reason=printable(body.reason))
        case _:
            raise PeerError(f"{kind!r} is no message of a device in a round")
    if _ROUND_ID.fullmatch(body.round_id) is None:
        raise PeerError(f"{printable(body.round_id)!r} is no round")
    return body.round_id, event


def event_to_wire(round_id: str, event: rounds.DeviceEvent) -> pb.SessionRequest:
    """Write a device's answer, as `event_from_wire` reads it."""
    match event:
        case rounds.KeysAdvertised(advert=advert):
            return pb.SessionRequest(key_advert=advert_to_wire(round_id, advert))
        case rounds.SharesSent(shares=shares):
            return pb.SessionRequest(shares=shares_to_wire(round_id, shares))
        case rounds.UpdateUploaded(digest=digest, size=size):
            update = pb.MaskedUpdate(round_id=round_id, digest=digest, size=size)
            return pb.SessionRequest(masked_update=update)
        case rounds.PlainUpdateUploaded(digest=digest, size=size, num_examples=num_examples):
            return pb.SessionRequest(
                plain_update=pb.PlainUpdate(
                    round_id=round_id, digest=digest, size=size, num_examples=num_examples
                )
            )
        case rounds.SurvivorsConfirmed(confirmation=confirmation):
            signed = confirmation_to_wire(round_id, confirmation)
            return pb.SessionRequest(confirmation=signed)
        case rounds.SharesRevealed(reveal=reveal):
            return pb.SessionRequest(reveal=reveal_to_wire(round_id, reveal))
        case rounds.DeviceLost(reason=reason):
            return withdrawal(round_id, reason)


# --- what the coordinator says ---


def invite_to_wire(order: rounds.RoundOrder) -> pb.RoundInvite:
    """Write an invitation."""
    invite = pb.RoundInvite(
        round_id=order.round_id,
        model_digest=order.model_digest,
        training=config_to_wire(order.training),
        min_examples=order.min_examples,
    )
    invite.personal.extend(order.method.personal)
    invite.scaffold = order.method.scaffold
    invite.model_name = order.model_name
    invite.campaign_id = order.campaign_id
    invite.population = order.population
    put_work(invite, order.work)
    _put_plan(invite, order.plan)
    if order.encoding is not None:
        invite.private_update.CopyFrom(encoding_to_wire(order.encoding))
    return invite


def _put_plan(message: pb.RoundInvite | pb.Round, plan: RoundPlan | PlainPlan) -> None:
    """Write which kind of round it is, and its numbers."""
    match plan:
        case PlainPlan():
            message.plain_plan.CopyFrom(plain_plan_to_wire(plan))
        case RoundPlan():
            message.plan.CopyFrom(plan_to_wire(plan))


def instruction_to_wire(round_id: str, instruction: rounds.Instruction) -> pb.SessionResponse:
    """Write what a device has to do."""
    match instruction:
        case rounds.TakePart(order=order):
            return pb.SessionResponse(invite=invite_to_wire(order))
        case rounds.ShareSecrets(adverts=adverts):
            keys = [advert_to_wire(round_id, advert) for advert in adverts]
            return pb.SessionResponse(
                neighbour_keys=pb.NeighbourKeys(round_id=round_id, adverts=keys)
            )
        case rounds.SendUpdate(shares=shares):
            inbox = [share_to_wire(share) for share in shares]
            return pb.SessionResponse(
                neighbour_shares=pb.NeighbourShares(round_id=round_id, shares=inbox)
            )
        case rounds.ConfirmSurvivors(survivors=survivors):
            return pb.SessionResponse(
                survivors=pb.Survivors(round_id=round_id, device_ids=survivors)
            )
        case rounds.RevealShares(confirmations=confirmations):
            signed = [confirmation_to_wire(round_id, c) for c in confirmations]
            return pb.SessionResponse(
                confirmations=pb.Confirmations(round_id=round_id, confirmations=signed)
            )
        case rounds.Finish(committed=committed, counted=counted, reason=reason):
            return pb.SessionResponse(
                round_end=pb.RoundEnd(
                    round_id=round_id, committed=committed, counted=counted, reason=reason
                )
            )


def round_end(record: pb.Round, device_id: str, round_id: str) -> pb.SessionResponse:
    """Tell a device how a round, as it calls it, ended that is only a record by now."""
    finish = rounds.finish(
        device_id,
        committed=record.stage == pb.ROUND_STAGE_COMMITTED,
        survivors=record.survivors,
        lost=record.lost,
        reason=record.reason,
    )
    return instruction_to_wire(round_id, finish)


def unknown_round(round_id: str) -> pb.SessionResponse:
    """Tell a device that nobody waits for its round."""
    return pb.SessionResponse(
        round_end=pb.RoundEnd(
            round_id=printable(round_id), reason="the coordinator knows no such round"
        )
    )


def round_of(message: pb.SessionResponse | pb.SessionRequest) -> str:
    """Give the round that a message says it belongs to; empty if it says none."""
    kind = message.WhichOneof("body")
    return getattr(getattr(message, kind), "round_id", "") if kind else ""


def round_to_wire(round_: rounds.Round, received: int, sent: int) -> pb.Round:
    """Write the record of a round."""
    weight = 0 if round_.result is None else round_.result.total_weight
    record = pb.Round(
        round_id=round_.order.round_id,
        number=round_.order.number,
        stage=round_.stage.value,  # type: ignore[arg-type]
        invited=round_.order.invited,
        cohort=round_.cohort,
        sharers=round_.sharers,
        survivors=round_.survivors,
        lost=round_.lost,
        reason=round_.reason,
        total_weight=weight,
        started_at=timestamp(round_.started_at),
        ended_at=timestamp(round_.ended_at),
        bytes_received=received,
        bytes_sent=sent,
        work=kind_of_work(round_.order.work),
        metrics=dict(round_.result.metrics) if round_.result else None,
        model_digest=round_.order.model_digest,
        bases=_bases(round_.order),
        answer=round_.result.answer if round_.result else (),
    )
    _put_plan(record, round_.order.plan)
    return record


def _bases(order: rounds.RoundOrder) -> dict[str, str]:
    bases = order.buffer.bases if order.buffer else {}
    return {device_id: base.round_id for device_id, base in bases.items()}


def without_names(record: pb.Round) -> pb.Round:
    """Copy a round's record without the lists of devices, which are most of it."""
    short = pb.Round()
    short.CopyFrom(record)
    for name in ("invited", "cohort", "sharers", "survivors", "lost", "bases", "answer"):
        short.ClearField(name)
    return short
