"""Whether alarms open a case, and what comes next in it. No clock, no disk.

A case is the fold of its entries in the journal:

    opened -> [approved] -> started -> trained | campaign -> judged -> [approved] -> [canary]
                   |           |                               |           |            |
               dismissed     failed                         refused    dismissed    rolled-back

and, where none of these ends comes, promoted. Where `[gates] approvals` asks for other people's
signatures a case is `waiting` before canary and promotion, until it is `agreed` or has `expired`.

`started` comes again after each crash; what is behind it is not done again.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from minga.cluster.response.alarms import Alarm
from minga.cluster.response.config import RespondConfig

MAX_ATTEMPTS = 3
"""How often the work of a case may end without a word before the case has failed."""

DAY_S = 86_400.0

STALE = "stale"
"""The alarm about a champion that is old or worn."""


class Kind(StrEnum):
    """What an entry of the journal tells."""

    ALARM = "alarm"
    RESOLVED = "resolved"
    HELD = "held"
    OPENED = "opened"
    APPROVED = "approved"
    DISMISSED = "dismissed"
    STARTED = "started"
    CALLED = "called"
    CAMPAIGN = "campaign"
    TRAINED = "trained"
    JUDGED = "judged"
    WAITING = "waiting"
    AGREED = "agreed"
    CANARY = "canary"
    ROLLED_BACK = "rolled-back"
    PROMOTED = "promoted"
    REFUSED = "refused"
    OVERTAKEN = "overtaken"
    EXPIRED = "expired"
    FAILED = "failed"


ENDS = frozenset(
    {
        Kind.DISMISSED,
        Kind.PROMOTED,
        Kind.REFUSED,
        Kind.ROLLED_BACK,
        Kind.OVERTAKEN,
        Kind.EXPIRED,
        Kind.FAILED,
    }
)
FREE = frozenset({Kind.DISMISSED, Kind.OVERTAKEN})
"""Ends of cases that do not count against the budget."""

SIGNATURES = "signatures"
"""What a case waits for that needs the approvals of `[gates]`; `minga model approve` gives one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One line of the story.

    Attributes:
        at: when, in seconds since 1970.
        case: its number; None for what belongs to no case.
    """

    number: int
    at: float
    case: int | None
    kind: Kind
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """An alarm and when it was last told."""

    alarm: Alarm
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Where a case stands.

    Attributes:
        opening: the detail of its first entry.
        last: its newest entry.
        approved: what people agreed to: `start`, `promotion`.
        attempts: how often its work was started, since a person last agreed to it.
        done: the newest detail of each kind of entry.
        end: how it ended; None while it is open.
        ended_at: when, in seconds since 1970.
    """

    number: int
    opened_at: float
    opening: Mapping[str, Any]
    approved: frozenset[str] = frozenset()
    attempts: int = 0
    done: Mapping[Kind, Mapping[str, Any]]
    end: Kind | None = None
    ended_at: float = 0.0

    def awaited(self, config: RespondConfig) -> str:
        """Tell what a person has to agree to before this goes on; empty if nothing."""
        if self.end is not None:
            return ""
        if Kind.WAITING in self.done:
            return SIGNATURES
        if config.approval == "none":
            return ""
        if config.approval == "start":
            return "" if "start" in self.approved else "start"
        judged = self.done.get(Kind.JUDGED)
        waits = judged is not None and judged["blessed"] and "promotion" not in self.approved
        return "promotion" if waits else ""


def cases_of(entries: Iterable[Entry]) -> tuple[Case, ...]:
    """Fold a story into its cases, oldest first."""
    cases: dict[int, Case] = {}
    for entry in entries:
        if entry.case is None:
            continue
        if entry.kind is Kind.OPENED:
            cases[entry.case] = Case(
                number=entry.case, opened_at=entry.at, opening=entry.detail, done={}
            )
        else:
            cases[entry.case] = _after(cases[entry.case], entry)
    return tuple(cases.values())


def _after(case: Case, entry: Entry) -> Case:
    done = {**case.done, entry.kind: entry.detail}
    match entry.kind:
        case Kind.APPROVED:
            approved = case.approved | {str(entry.detail["what"])}
            return replace(case, done=done, approved=approved, attempts=0)
        case Kind.AGREED:
            done.pop(Kind.WAITING, None)
            return replace(case, done=done, attempts=0)
        case Kind.STARTED:
            return replace(case, done=done, attempts=case.attempts + 1)
        case kind if kind in ENDS:
            return replace(case, done=done, end=kind, ended_at=entry.at)
        case _:
            return replace(case, done=done)


@dataclass(frozen=True, slots=True)
class Open:
    """Open a case for these alarms."""

    alarms: Sequence[Alarm]


@dataclass(frozen=True, slots=True)
class Hold:
    """Do nothing for now, and why."""

    reason: str
    until: float | None = None


def is_ours(alarm: Alarm, model: str, config: RespondConfig) -> bool:
    """Tell whether an alarm may act on a model."""
    return alarm.name in config.alarms and alarm.model in ("", model)


def decide(
    firing: Iterable[Heard], cases: Sequence[Case], config: RespondConfig, now: float
) -> Open | Hold | None:
    """Say what the alarms lead to.

    Args:
        firing: those that are not over.
        cases: all so far, oldest first.
        config: the limits.
        now: seconds since 1970.

    Returns:
        None if there is nothing to do: no alarm was told since the last case ended, or one is
        under way.
    """
    last = cases[-1] if cases else None
    if last is not None and last.end is None:
        return None
    ended_at = last.ended_at if last else 0.0
    news = [heard.alarm for heard in firing if heard.at > ended_at]
    if not news:
        return None
    worked = [each for each in cases if each.end is not Kind.OVERTAKEN]
    if worked and now < worked[-1].ended_at + config.cooldown_s:
        until = worked[-1].ended_at + config.cooldown_s
        return Hold(f"case {worked[-1].number} ended a short time ago", until)
    since = now - config.period_days * DAY_S
    counted = [each for each in cases if each.opened_at > since and each.end not in FREE]
    if len(counted) >= config.max_cases:
        until = counted[-config.max_cases].opened_at + config.period_days * DAY_S
        return Hold(
            f"{len(counted)} cases in {config.period_days:g} days are all that may be", until
        )
    return Open(sorted(news, key=lambda alarm: (alarm.since, alarm.fingerprint)))
