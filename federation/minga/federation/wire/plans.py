"""Plans of campaigns and rounds on the wire."""

from minga.federation.aggregation.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
    ServerOptimizer,
)
from minga.federation.aggregation.privacy import PrivateEncoding, num_noisy, size_noise
from minga.federation.analytics import Question
from minga.federation.condition import Requirements
from minga.federation.errors import PeerError
from minga.federation.flower.config import StrategyName
from minga.federation.plain import PlainPlan
from minga.federation.secagg.plan import RoundPlan, context_digest, derive_plan
from minga.federation.trainer import TrainingConfig
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.wire.aggregation import encoding_of_invite, privacy_from_wire
from minga.federation.wire.values import check_digest, config_from_wire, config_to_wire
from minga.federation.wire.work import evaluation_from_wire, method_of, subject_of_invite
from minga.federation.work import TRAINING, Evaluation, Training, Work, value_bits


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


def strategy_to_wire(name: StrategyName | None) -> pb.FlowerStrategy | None:
    """Write a Flower strategy."""
    if name is None:
        return None
    return pb.FlowerStrategy(
        reference=name.reference,
        arguments=config_to_wire(name.arguments),
        on_sums=name.on_sums,
    )


def strategy_from_wire(plan: pb.CampaignPlan) -> StrategyName | None:
    """Read the Flower strategy of a campaign, if it has one.

    Raises:
        PeerError: an argument has no value.
    """
    if not plan.HasField("flower_strategy"):
        return None
    strategy = plan.flower_strategy
    return StrategyName(
        reference=strategy.reference,
        arguments=config_from_wire(strategy.arguments),
        on_sums=strategy.on_sums,
    )


def num_groups(plan: pb.CampaignPlan) -> int:
    """Say within how many groups a secure round of a campaign sums."""
    return max(1, plan.num_groups)


def is_plain(plan: pb.CampaignPlan) -> bool:
    """Say whether the coordinator sees each update; secure unless it is said clearly."""
    return plan.protection == pb.PROTECTION_PLAIN


def evaluation_of(plan: pb.CampaignPlan) -> Evaluation | None:
    """Read what a campaign's devices measure; None if they measure nothing.

    Raises:
        PeerError: it cannot work.
    """
    return evaluation_from_wire(plan.evaluation) if plan.HasField("evaluation") else None


def requirements_to_wire(requirements: Requirements) -> pb.Requirements:
    """Write what a campaign asks of devices."""
    return pb.Requirements(
        charging=requirements.charging,
        idle=requirements.idle,
        min_free_memory_bytes=requirements.min_free_memory_bytes,
        min_examples=requirements.min_examples,
    )


def requirements_from_wire(plan: pb.CampaignPlan) -> Requirements:
    """Read what a campaign asks of devices."""
    asked = plan.requirements
    return Requirements(
        charging=asked.charging,
        idle=asked.idle,
        min_free_memory_bytes=asked.min_free_memory_bytes,
        min_examples=asked.min_examples,
    )


def round_plan(
    plan: pb.CampaignPlan,
    *,
    round_id: str,
    model_digest: bytes,
    training: TrainingConfig,
    num_values: int,
    num_invited: int,
    work: Work = TRAINING,
) -> tuple[RoundPlan | PlainPlan, PrivateEncoding | None]:
    """Derive the plan of one round of a campaign, and how its devices make their updates private.

    Devices that are invited beyond the cohort are expected to be lost, like others. Where updates
    are private, or devices have control variates, all of them weigh 1.

    Args:
        plan: the campaign's numbers.
        round_id: 32 hexadecimal digits.
        model_digest: of the model that the round is about.
        training: what the devices' training is told.
        num_values: how many values the model has.
        num_invited: how many devices are invited.
        work: what they are asked.

    Raises:
        ValueError, PeerError: the campaign's numbers cannot work for so many devices.
    """
    num_values, method = work.num_values(num_values), method_of(plan)
    privacy = privacy_from_wire(plan)
    # A control variate is the mean over devices, not over examples.
    is_uniform = isinstance(work, Training) and (privacy is not None or method.scaffold)
    max_weight = 1 if is_uniform else plan.max_weight
    encoding = None if privacy is None else PrivateEncoding(max_norm=privacy.max_norm)
    if is_plain(plan):
        return PlainPlan(num_values=num_values, max_weight=max_weight), encoding
    cohort = num_invited // num_groups(plan)
    not_needed = max(0, num_invited - plan.cohort) / max(1, num_invited)
    expected_dropout = 1 - (1 - plan.expected_dropout) * (1 - not_needed)
    clip, bits = _clip_of(work, plan), value_bits(work, plan.value_bits, cohort)
    if privacy is not None:
        clip = privacy.max_norm
        if privacy.clip is not None:  # without noise of devices one level tells the bit exactly
            encoding = PrivateEncoding(max_norm=privacy.max_norm, bit_level=1)
    if privacy is not None and privacy.is_distributed:
        size = size_noise(
            noise_multiplier=privacy.noise_multiplier,
            max_norm=privacy.max_norm,
            num_values=num_values,
            num_noisy=num_noisy(num_invited, expected_dropout, plan.colluder_share),
            min_cohort=plan.min_cohort,
            cohort=num_invited,
            adaptive=privacy.clip,
        )
        clip, bits = size.clip, size.value_bits
        encoding = PrivateEncoding(
            max_norm=privacy.max_norm, variance=size.variance, bit_level=size.bit_level
        )
    derived = derive_plan(
        round_id=bytes.fromhex(round_id),
        context_digest=_context(work.subject(method.subject(model_digest)), training, encoding),
        num_values=num_values + (0 if encoding is None else encoding.num_bits),
        cohort_size=cohort,
        clip=clip,
        value_bits=bits,
        max_weight=max_weight,
        # Noise is sized for the model's own coordinates; what is no model has no need of it.
        rotate=plan.rotate and privacy is None and isinstance(work, Training),
        expected_dropout=expected_dropout,
        colluder_share=plan.colluder_share,
    )
    return derived, encoding


def _context(subject: bytes, training: TrainingConfig, encoding: PrivateEncoding | None) -> bytes:
    """Name what a round's members do alike: another bound or less noise would be something else."""
    config = dict(training)
    if encoding is not None:
        config["private_update.max_norm"] = encoding.max_norm
        config["private_update.variance"] = encoding.variance
        if encoding.bit_level:  # left out where there is no bit, as before there were any
            config["private_update.bit_level"] = encoding.bit_level
    return context_digest(subject, config)


def _clip_of(work: Work, plan: pb.CampaignPlan) -> float:
    match work:
        case Evaluation(clip=clip):
            return clip
        case Question():
            return 1.0  # means of shares
        case Training():
            return plan.clip


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
        rotate=plan.rotate,
    )


def plain_plan_to_wire(plan: PlainPlan) -> pb.PlainPlan:
    """Write a plain round's plan."""
    return pb.PlainPlan(num_values=plan.num_values, max_weight=plan.max_weight)


def plan_of_invite(invite: pb.RoundInvite) -> RoundPlan | PlainPlan:
    """Read the plan of an invitation, bound to the model and the training that it names.

    Raises:
        ValueError, PeerError: the plan is not safe, or the invitation contradicts itself.
    """
    if not invite.HasField("question"):
        check_digest(invite.model_digest)
    if invite.HasField("plan") == invite.HasField("plain_plan"):
        raise PeerError("an invitation is to a secure or to a plain round, one of both")
    if invite.HasField("plain_plan"):
        plain = invite.plain_plan
        return PlainPlan(num_values=plain.num_values, max_weight=plain.max_weight)
    plan = invite.plan
    if plan.round_id.hex() != invite.round_id:
        raise PeerError("the invitation and its plan name different rounds")
    return RoundPlan(
        round_id=plan.round_id,
        context_digest=_context(
            subject_of_invite(invite), config_from_wire(invite.training), encoding_of_invite(invite)
        ),
        num_values=plan.num_values,
        max_cohort=plan.max_cohort,
        num_neighbours=plan.num_neighbours,
        threshold=plan.threshold,
        value_bits=plan.value_bits,
        clip=plan.clip,
        max_weight=plan.max_weight,
        rotate=plan.rotate,
    )
