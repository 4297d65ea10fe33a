"""The `[federation]` table as the plan of a campaign, on real devices or on virtual ones."""

from collections.abc import Mapping, Sequence

from minga.federation.config import FederationConfig
from minga.federation.trainer import Scalar
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.wire import (
    config_to_wire,
    evaluation_to_wire,
    optimizer_to_wire,
    privacy_to_wire,
    requirements_to_wire,
    rule_to_wire,
    strategy_to_wire,
)
from minga.federation.work import new_evaluation

_PROTECTIONS = {"secure": pb.PROTECTION_SECURE, "plain": pb.PROTECTION_PLAIN}


def campaign_plan(
    config: FederationConfig,
    *,
    model_name: str,
    parent_version: str,
    training: Mapping[str, Scalar],
    metrics: Sequence[str] = (),
) -> pb.CampaignPlan:
    """Write the `[federation]` table as the plan of a campaign.

    Args:
        config: the table.
        model_name: which model it trains.
        parent_version: the version that it starts from.
        training: the devices' training parameters; those of the table override them.
        metrics: what devices measure, if the table asks for an evaluation and names nothing.
    """
    optimizer = config.server_optimizer.optimizer()
    plan = pb.CampaignPlan(
        model_name=model_name,
        parent_version=parent_version,
        num_rounds=config.num_rounds,
        group=config.group,
        cohort=config.cohort,
        min_cohort=config.min_cohort,
        value_bits=config.value_bits,
        clip=config.clip,
        max_weight=config.max_weight,
        rotate=config.rotate,
        server_learning_rate=optimizer.learning_rate,
        invite_timeout_s=config.invite_timeout_s,
        stage_timeout_s=config.stage_timeout_s,
        training_timeout_s=config.training_timeout_s,
        training=config_to_wire({**training, **config.training}),
        expected_dropout=config.expected_dropout,
        colluder_share=config.colluder_share,
        server_optimizer=optimizer_to_wire(optimizer),
        flower_strategy=strategy_to_wire(config.flower.strategy_name),
        protection=_PROTECTIONS[config.protection],
        num_groups=config.groups,
        over_selection=config.over_selection,
        requirements=requirements_to_wire(config.requirements.requirements()),
        personal=config.personal,
        scaffold=config.scaffold,
        rule=rule_to_wire(config.rule.rule()),
        privacy=privacy_to_wire(config.privacy.privacy()),
    )
    if config.buffer.size:
        plan.buffer.size = config.buffer.size
        plan.buffer.max_staleness = config.buffer.max_staleness
    if config.evaluation.enabled:
        asked = config.evaluation
        work = new_evaluation(asked.metrics or metrics, asked.clip)
        plan.evaluation.CopyFrom(evaluation_to_wire(work))
        plan.evaluate_every = asked.every
    return plan
