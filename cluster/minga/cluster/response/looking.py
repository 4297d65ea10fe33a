"""What the responder finds in the registry by itself: a stale champion, and the word of people.

Both are looked for from time to time. What is found is an alarm or an entry in the journal like any
other, so a responder that is killed and started again misses nothing.
"""

from collections.abc import Sequence
from datetime import UTC, datetime

from minga.cluster.ancestry import limits_of, wear_everywhere
from minga.cluster.project import Project
from minga.cluster.response.alarms import Alarm
from minga.cluster.response.journal import Journal
from minga.cluster.response.policy import STALE, Case, Kind
from minga.training.ageing import Wear, why_stale
from minga.training.errors import ApprovalError
from minga.training.registry import CHAMPION


def see_age(project: Project, journal: Journal, cases: Sequence[Case], now: float) -> None:
    """Raise an alarm if the champion is stale.

    It is raised once. If its case ends without a new champion it is raised again after
    `[gates] max_age_days`, and not whenever the cool-down is over: what no training improves
    needs no more of it.
    """
    name, limits = project.loaded_task.name, limits_of(project)
    champion = project.registry().find(name, CHAMPION)
    if champion is None:
        return
    wear = wear_everywhere(project).get((name, champion.version), Wear())
    reasons = why_stale(champion, wear, now=datetime.fromtimestamp(now, UTC), limits=limits)
    alarm = Alarm(
        fingerprint=f"stale/{name}/{champion.version}",
        name=STALE,
        model=name,
        version=str(champion.version),
        summary=f"version {champion.version} is stale: {'; '.join(reasons)}",
        since=champion.created_at_ms / 1000,
        is_firing=bool(reasons),
        origin="registry",
    )
    told = [one.at for one in journal.firing() if one.alarm.fingerprint == alarm.fingerprint]
    if not reasons:
        if told:
            journal.hear((alarm,))
        return
    mine = [case for case in cases if _is_about(case, champion.version)]
    again_at = mine[-1].ended_at + limits.max_age.total_seconds() if mine else 0.0
    ended_at = cases[-1].ended_at if cases else 0.0
    if now >= again_at and not any(at > ended_at for at in told):
        journal.hear((alarm,))


def _is_about(case: Case, version: int) -> bool:
    """Tell whether a case was an answer to a version's being stale; one that failed is none."""
    return case.end is not Kind.FAILED and any(
        alarm["name"] == STALE and alarm["version"] == str(version)
        for alarm in case.opening["alarms"]
    )


def see_agreement(project: Project, journal: Journal, case: Case, now: float) -> None:
    """Let a waiting case go on if the approvals are there, or end it if they come no more.

    A case whose version somebody promoted, or whose champion is another one by now, goes on too:
    its work finds out.
    """
    registry, name = project.registry(), project.loaded_task.name
    judged = case.done[Kind.JUDGED]
    try:
        found = registry.require_approved(name, int(judged["version"]))
    except ApprovalError:
        champion = registry.get(name, CHAMPION).version
        if champion != judged["champion"]:
            journal.tell(Kind.AGREED, case.number, reason=f"version {champion} is champion now")
        elif now >= case.done[Kind.WAITING]["until"]:
            journal.tell(Kind.EXPIRED, case.number, version=judged["version"])
        return
    journal.tell(Kind.AGREED, case.number, by=list(found.people))
