"""Protobuf messages <-> the dataclasses that the rest of the federation speaks.

Everything that comes from the other side is converted here once; what has a wrong form raises
`PeerError` here, so that no other module handles a malformed message.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from minga.federation.aggregation.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)
from minga.federation.blobs import DIGEST_BYTES
from minga.federation.coordinator import rounds
from minga.federation.errors import PeerError
from minga.federation.identity import is_name
from minga.federation.limits import MAX_REASON_CHARS, MAX_VERSION_CHARS
from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare, Reveal
from minga.federation.secagg.plan import RoundPlan, context_digest, derive_plan
from minga.federation.trainer import Scalar
from minga.federation.v1 import federation_pb2 as pb

_ROUND_ID = re.compile(r"[0-9a-f]{32}")

# --- small things ---


def plain(text: str) -> str:
    """Make a peer's free text fit for a log, a database or a terminal: short and printable."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_REASON_CHARS])


def timestamp(seconds: float | None) -> Timestamp | None:
    """Give a time in seconds since 1970 as it goes over the wire."""
    if seconds is None:
        return None
    moment = Timestamp()
    moment.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return moment


def config_to_wire(config: Mapping[str, Scalar]) -> dict[str, pb.Value]:
    """Write a training configuration."""
    values = {}
    for name, value in config.items():
        match value:
            case bool():
                values[name] = pb.Value(bool_value=value)
            case int():
                values[name] = pb.Value(int_value=value)
            case float():
                values[name] = pb.Value(double_value=value)
            case _:
                values[name] = pb.Value(string_value=value)
    return values


def config_from_wire(values: Mapping[str, pb.Value]) -> dict[str, Scalar]:
    """Read a training configuration."""
    config: dict[str, Scalar] = {}
    for name, value in values.items():
        kind = value.WhichOneof("kind")
        if kind is None:
            raise PeerError(f"training parameter {name!r} has no value")
        config[name] = getattr(value, kind)
    return config


# --- models ---


def check_model(name: str, version: str, digest: bytes) -> None:
    """Refuse a model version that no device could keep, or that no listing could show.

    Raises:
        PeerError: name, version or digest has a wrong form.
    """
    if not is_name(name):
        raise PeerError(f"{plain(name)!r} is no model name: use a-z, 0-9 and '-'")
    if not 0 < len(version) <= MAX_VERSION_CHARS or not version.isprintable() or "/" in version:
        raise PeerError(
            f"{plain(version)!r} is no version: use 1 to {MAX_VERSION_CHARS} characters, no '/'"
        )
    _check_digest(digest)


def model_report(report: pb.ModelReport) -> pb.ModelReport:
    """Read what a device says of a model, fit to be stored and listed.

    Raises:
        PeerError: see `check_model`.
    """
    check_model(report.name, report.version, report.digest)
    return pb.ModelReport(
        name=report.name,
        version=report.version,
        digest=report.digest,
        state=report.state,
        detail=plain(report.detail),
    )


def _check_digest(digest: bytes) -> None:
    if len(digest) != DIGEST_BYTES:
        raise PeerError(f"a blob's digest has {DIGEST_BYTES} bytes, got {len(digest)}")


# --- plans ---


def optimizer_to_wire(optimizer: ServerOptimizer) -> pb.ServerOptimizer:
    """Write a server optimiser; its learning rate is a number of the plan's own."""
    match optimizer:
        case FedAvg():
            return pb.ServerOptimizer(fedavg=pb.FedAvg())
        case FedAvgM(momentum=momentum):
            return pb.ServerOptimizer(fedavgm=pb.FedAvgM(momentum=momentum))
        case FedAdagrad(beta_1=beta_1, tau=tau):
            return pb.ServerOptimizer(fedadagrad=pb.FedAdagrad(beta_1=beta_1, tau=tau))
        case FedAdam(beta_1=beta_1, beta_2=beta_2, tau=tau):
            return pb.ServerOptimizer(fedadam=pb.FedAdam(beta_1=beta_1, beta_2=beta_2, tau=tau))
        case FedYogi(beta_1=beta_1, beta_2=beta_2, tau=tau):
            return pb.ServerOptimizer(fedyogi=pb.FedYogi(beta_1=beta_1, beta_2=beta_2, tau=tau))
        case _:
            raise AssertionError(f"{type(optimizer).__name__} has no form on the wire")


def optimizer_from_wire(plan: pb.CampaignPlan) -> ServerOptimizer:
    """Read the server optimiser of a campaign.

    Raises:
        PeerError: it is one that this version does not know.
        ValueError: a number is out of its range.
    """
    rate, message = plan.server_learning_rate, plan.server_optimizer
    kind = message.WhichOneof("kind") if plan.HasField("server_optimizer") else "fedavg"
    match getattr(message, kind) if kind else None:
        case pb.FedAvg():
            return FedAvg(learning_rate=rate)
        case pb.FedAvgM(momentum=momentum):
            return FedAvgM(learning_rate=rate, momentum=momentum)
        case pb.FedAdagrad(beta_1=beta_1, tau=tau):
            return FedAdagrad(learning_rate=rate, beta_1=beta_1, tau=tau)
        case pb.FedAdam(beta_1=beta_1, beta_2=beta_2, tau=tau):
            return FedAdam(learning_rate=rate, beta_1=beta_1, beta_2=beta_2, tau=tau)
        case pb.FedYogi(beta_1=beta_1, beta_2=beta_2, tau=tau):
            return FedYogi(learning_rate=rate, beta_1=beta_1, beta_2=beta_2, tau=tau)
        case _:
            raise PeerError(
                "the plan names no server optimiser that this coordinator knows; upgrade it"
            )


def round_plan(
    plan: pb.CampaignPlan, *, round_id: str, model_digest: bytes, num_values: int, cohort: int
) -> RoundPlan:
    """Derive the plan of one round of a campaign.

    Raises:
        ValueError: the campaign's numbers cannot work for this cohort.
    """
    return derive_plan(
        round_id=bytes.fromhex(round_id),
        context_digest=context_digest(model_digest, config_from_wire(plan.training)),
        num_values=num_values,
        cohort_size=cohort,
        clip=plan.clip,
        value_bits=plan.value_bits,
        max_weight=plan.max_weight,
        expected_dropout=plan.expected_dropout,
        colluder_share=plan.colluder_share,
    )


def plan_to_wire(plan: RoundPlan) -> pb.SecureAggregationPlan:
    """Write a plan; its context is not sent, each side computes it from what it really uses."""
    return pb.SecureAggregationPlan(
        round_id=plan.round_id,
        num_values=plan.num_values,
        max_cohort=plan.max_cohort,
        num_neighbours=plan.num_neighbours,
        threshold=plan.threshold,
        value_bits=plan.value_bits,
        clip=plan.clip,
        max_weight=plan.max_weight,
    )


def plan_of_invite(invite: pb.RoundInvite) -> RoundPlan:
    """Read the plan of an invitation, bound to the model and the training that it names.

    Raises:
        ValueError, PeerError: the plan is not safe, or the invitation contradicts itself.
    """
    plan = invite.plan
    if plan.round_id.hex() != invite.round_id:
        raise PeerError("the invitation and its plan name different rounds")
    _check_digest(invite.model_digest)
    return RoundPlan(
        round_id=plan.round_id,
        context_digest=context_digest(invite.model_digest, config_from_wire(invite.training)),
        num_values=plan.num_values,
        max_cohort=plan.max_cohort,
        num_neighbours=plan.num_neighbours,
        threshold=plan.threshold,
        value_bits=plan.value_bits,
        clip=plan.clip,
        max_weight=plan.max_weight,
    )


# --- secure aggregation ---


def advert_to_wire(round_id: str, advert: Advert) -> pb.KeyAdvert:
    """Write a key advert."""
    return pb.KeyAdvert(
        round_id=round_id,
        device_id=advert.device_id,
        mask_key=advert.mask_key,
        share_key=advert.share_key,
        self_seed_commitment=advert.self_seed_commitment,
        certificate=advert.certificate,
        signature=advert.signature,
    )


def advert_from_wire(advert: pb.KeyAdvert) -> Advert:
    """Read a key advert."""
    return Advert(
        device_id=advert.device_id,
        mask_key=advert.mask_key,
        share_key=advert.share_key,
        self_seed_commitment=advert.self_seed_commitment,
        certificate=advert.certificate,
        signature=advert.signature,
    )


def share_to_wire(share: EncryptedShare) -> pb.EncryptedShare:
    """Write an encrypted share."""
    return pb.EncryptedShare(
        sender=share.sender, receiver=share.receiver, ciphertext=share.ciphertext
    )


def share_from_wire(share: pb.EncryptedShare) -> EncryptedShare:
    """Read an encrypted share."""
    return EncryptedShare(sender=share.sender, receiver=share.receiver, ciphertext=share.ciphertext)


def shares_to_wire(round_id: str, shares: Iterable[EncryptedShare]) -> pb.SharesUpload:
    """Write all that a device shares."""
    return pb.SharesUpload(round_id=round_id, shares=[share_to_wire(share) for share in shares])


def confirmation_to_wire(round_id: str, confirmation: Confirmation) -> pb.SurvivorConfirmation:
    """Write a signature under the survivors."""
    return pb.SurvivorConfirmation(
        round_id=round_id,
        device_id=confirmation.device_id,
        signature=confirmation.signature,
    )


def confirmation_from_wire(confirmation: pb.SurvivorConfirmation) -> Confirmation:
    """Read a signature under the survivors."""
    return Confirmation(device_id=confirmation.device_id, signature=confirmation.signature)


def reveal_to_wire(round_id: str, reveal: Reveal) -> pb.ShareReveal:
    """Write a reveal."""
    return pb.ShareReveal(
        round_id=round_id,
        self_seed_shares=_revealed(reveal.self_seed_shares),
        mask_key_shares=_revealed(reveal.mask_key_shares),
    )


def _revealed(shares: Mapping[str, bytes]) -> list[pb.RevealedShare]:
    return [pb.RevealedShare(peer=peer, share=share) for peer, share in sorted(shares.items())]


def reveal_from_wire(device_id: str, reveal: pb.ShareReveal) -> Reveal:
    """Read a reveal."""
    return Reveal(
        device_id=device_id,
        self_seed_shares={share.peer: share.share for share in reveal.self_seed_shares},
        mask_key_shares={share.peer: share.share for share in reveal.mask_key_shares},
    )


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
        case pb.SurvivorConfirmation():
            event = rounds.SurvivorsConfirmed(
                device_id=device_id, confirmation=confirmation_from_wire(body)
            )
        case pb.ShareReveal():
            event = rounds.SharesRevealed(
                device_id=device_id, reveal=reveal_from_wire(device_id, body)
            )
        case pb.RoundWithdrawal():
            event = rounds.DeviceLost(device_id=device_id, reason=plain(body.reason))
        case _:
            raise PeerError(f"{kind!r} is no message of a device in a round")
    if _ROUND_ID.fullmatch(body.round_id) is None:
        raise PeerError(f"{plain(body.round_id)!r} is no round")
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
    return pb.RoundInvite(
        round_id=order.round_id,
        plan=plan_to_wire(order.plan),
        model_digest=order.model_digest,
        training=config_to_wire(order.training),
    )


def instruction_to_wire(round_id: str, instruction: rounds.Instruction) -> pb.SessionResponse:
    """Write what a device has to do."""
    match instruction:
        case rounds.Advertise(order=order):
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


def round_end(record: pb.Round, device_id: str) -> pb.SessionResponse:
    """Tell a device how a round ended that is only a record by now."""
    finish = rounds.finish(
        device_id,
        committed=record.stage == pb.ROUND_STAGE_COMMITTED,
        survivors=record.survivors,
        lost=record.lost,
        reason=record.reason,
    )
    return instruction_to_wire(record.round_id, finish)


def unknown_round(round_id: str) -> pb.SessionResponse:
    """Tell a device that nobody waits for its round."""
    return pb.SessionResponse(
        round_end=pb.RoundEnd(
            round_id=plain(round_id), reason="the coordinator knows no such round"
        )
    )


def round_of(message: pb.SessionResponse) -> str:
    """Give the round that a step of the coordinator belongs to."""
    kind = message.WhichOneof("body")
    return getattr(getattr(message, kind), "round_id", "") if kind else ""


def round_to_wire(round_: rounds.Round, received: int, sent: int) -> pb.Round:
    """Write the record of a round."""
    weight = 0 if round_.result is None else round_.result.total_weight
    return pb.Round(
        round_id=round_.order.round_id,
        number=round_.order.number,
        stage=round_.stage.value,  # type: ignore[arg-type]
        plan=plan_to_wire(round_.order.plan),
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
    )


def without_names(record: pb.Round) -> pb.Round:
    """Copy a round's record without the lists of devices, which are most of it."""
    return pb.Round(
        round_id=record.round_id,
        number=record.number,
        stage=record.stage,
        plan=record.plan,
        reason=record.reason,
        total_weight=record.total_weight,
        started_at=record.started_at,
        ended_at=record.ended_at,
        bytes_received=record.bytes_received,
        bytes_sent=record.bytes_sent,
    )
