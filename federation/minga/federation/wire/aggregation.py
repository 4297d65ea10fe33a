"""Rules and privacy on the wire."""

from minga.federation.aggregation.adaptive_clip import AdaptiveClip
from minga.federation.aggregation.ledger import Budget
from minga.federation.aggregation.privacy import Privacy, PrivateEncoding
from minga.federation.aggregation.rules import (
    Clip,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    Rule,
    TrimmedMean,
)
from minga.federation.errors import PeerError
from minga.federation.v1 import federation_pb2 as pb


def rule_to_wire(rule: Rule) -> pb.AggregationRule:
    """Write a rule."""
    message = _kind_to_wire(rule)
    match rule.clip:
        case None:
            pass
        case Clip(max_norm=None):
            message.median_norm = True
        case Clip(max_norm=float() as max_norm):
            message.max_norm = max_norm
    return message


def _kind_to_wire(rule: Rule) -> pb.AggregationRule:
    match rule:
        case Mean():
            return pb.AggregationRule(mean=pb.Mean())
        case Median():
            return pb.AggregationRule(median=pb.Median())
        case TrimmedMean(liar_share=share):
            return pb.AggregationRule(trimmed_mean=pb.TrimmedMean(liar_share=share))
        case Krum(liar_share=share):
            return pb.AggregationRule(krum=pb.Krum(liar_share=share))
        case MultiKrum(liar_share=share):
            return pb.AggregationRule(multi_krum=pb.MultiKrum(liar_share=share))
        case GeometricMedian():
            return pb.AggregationRule(geometric_median=pb.GeometricMedian())
        case _:
            raise AssertionError(f"{type(rule).__name__} has no form on the wire")


def rule_from_wire(plan: pb.CampaignPlan) -> Rule:
    """Read the rule of a campaign.

    Raises:
        PeerError: it is one that this version does not know.
        ValueError: a number is out of its range.
    """
    if not plan.HasField("rule"):
        return Mean()
    kind, clip = plan.rule.WhichOneof("kind"), _clip(plan.rule)
    match getattr(plan.rule, kind) if kind else None:
        case pb.Mean():
            return Mean(clip=clip)
        case pb.Median():
            return Median(clip=clip)
        case pb.TrimmedMean(liar_share=share):
            return TrimmedMean(liar_share=share, clip=clip)
        case pb.Krum(liar_share=share):
            return Krum(liar_share=share, clip=clip)
        case pb.MultiKrum(liar_share=share):
            return MultiKrum(liar_share=share, clip=clip)
        case pb.GeometricMedian():
            return GeometricMedian(clip=clip)
        case _:
            raise PeerError("the plan names no rule that this coordinator knows; upgrade it")


def _clip(rule: pb.AggregationRule) -> Clip | None:
    match rule.WhichOneof("clip"):
        case "max_norm":
            return Clip(max_norm=rule.max_norm)
        case "median_norm":
            return Clip()
        case _:
            return None


def privacy_to_wire(privacy: Privacy | None) -> pb.Privacy | None:
    """Write what a campaign asks for of privacy."""
    if privacy is None:
        return None
    return pb.Privacy(
        epsilon=privacy.budget.epsilon,
        delta=privacy.budget.delta,
        noise_multiplier=privacy.noise_multiplier,
        max_norm=privacy.max_norm,
        distributed=privacy.is_distributed,
        quantile=0.0 if privacy.clip is None else privacy.clip.quantile,
        quantile_rate=0.0 if privacy.clip is None else privacy.clip.learning_rate,
    )


def privacy_from_wire(plan: pb.CampaignPlan) -> Privacy | None:
    """Read what a campaign asks for of privacy; None: nothing.

    Raises:
        PrivacyError: a number is out of its range.
    """
    if not plan.HasField("privacy"):
        return None
    message = plan.privacy
    clip = None
    if message.quantile:
        clip = AdaptiveClip(quantile=message.quantile, learning_rate=message.quantile_rate)
    return Privacy(
        budget=Budget(epsilon=message.epsilon, delta=message.delta),
        noise_multiplier=message.noise_multiplier,
        max_norm=message.max_norm,
        is_distributed=message.distributed,
        clip=clip,
    )


def encoding_to_wire(encoding: PrivateEncoding) -> pb.PrivateUpdate:
    """Write how a device makes its update private."""
    return pb.PrivateUpdate(
        max_norm=encoding.max_norm, variance=encoding.variance, bit_level=encoding.bit_level
    )


def encoding_of_invite(invite: pb.RoundInvite) -> PrivateEncoding | None:
    """Read how a device makes its update private; None: not at all.

    Raises:
        PrivacyError: a number is out of its range.
    """
    if not invite.HasField("private_update"):
        return None
    message = invite.private_update
    return PrivateEncoding(
        max_norm=message.max_norm, variance=message.variance, bit_level=message.bit_level
    )
