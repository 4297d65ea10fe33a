"""What a round asks of its devices, on the wire."""

from minga.federation.analytics import ColumnQuery, Part, Query, Question
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.work import Evaluation, Method, Training, Work


def put_work(invite: pb.RoundInvite, work: Work) -> None:
    """Write into an invitation what the round asks."""
    match work:
        case Evaluation():
            invite.evaluation.CopyFrom(evaluation_to_wire(work))
        case Question():
            invite.question.CopyFrom(_question_to_wire(work))
        case Training():
            pass


def work_of_invite(invite: pb.RoundInvite) -> Work:
    """Read what a round asks.

    Raises:
        PeerError: it cannot work.
    """
    if invite.HasField("question"):
        return _question_from_wire(invite.question)
    if invite.HasField("evaluation"):
        return evaluation_from_wire(invite.evaluation)
    return Training()


def method_of(message: pb.RoundInvite | pb.CampaignPlan) -> Method:
    """Read how devices learn.

    Raises:
        PeerError: it cannot work.
    """
    return Method(personal=tuple(message.personal), scaffold=message.scaffold)


def subject_of_invite(invite: pb.RoundInvite) -> bytes:
    """Give what a secure round's plan binds: the model, how it is learnt, and what is asked."""
    subject = method_of(invite).subject(invite.model_digest)
    return work_of_invite(invite).subject(subject)


def evaluation_to_wire(work: Evaluation) -> pb.Evaluation:
    """Write what is measured."""
    return pb.Evaluation(metrics=work.metrics, clip=work.clip)


def evaluation_from_wire(message: pb.Evaluation) -> Evaluation:
    """Read what is measured.

    Raises:
        PeerError: it cannot work.
    """
    return Evaluation(metrics=tuple(message.metrics), clip=message.clip)


def _question_to_wire(work: Question) -> pb.Question:
    return pb.Question(
        parts=[
            pb.QuestionPart(column=part.column, low=part.low, high=part.high, edges=part.edges)
            for part in work.parts
        ]
    )


def _question_from_wire(message: pb.Question) -> Question:
    return Question(
        parts=tuple(
            Part(column=part.column, low=part.low, high=part.high, edges=tuple(part.edges))
            for part in message.parts
        )
    )


def query_to_wire(query: Query) -> pb.Query:
    """Write what is to be found out."""
    return pb.Query(
        columns=[
            pb.ColumnQuery(
                column=column.column,
                low=column.low,
                high=column.high,
                edges=column.edges,
                quantiles=column.quantiles,
            )
            for column in query.columns
        ]
    )


def query_of(plan: pb.CampaignPlan) -> Query | None:
    """Read what a campaign is to find out; None if it trains.

    Raises:
        PeerError: it cannot work.
    """
    if not plan.HasField("query"):
        return None
    return Query(
        columns=tuple(
            ColumnQuery(
                column=column.column,
                low=column.low,
                high=column.high,
                edges=tuple(column.edges),
                quantiles=tuple(column.quantiles),
            )
            for column in plan.query.columns
        )
    )


def kind_of_work(work: Work) -> "pb.RoundWork.ValueType":
    """Give the kind of work as it is recorded."""
    match work:
        case Evaluation():
            return pb.ROUND_WORK_EVALUATION
        case Question():
            return pb.ROUND_WORK_QUERY
        case Training():
            return pb.ROUND_WORK_TRAINING
