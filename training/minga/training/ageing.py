"""What ages in a registry: champions, and versions that should serve no more."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from minga.training.document import Document
from minga.training.registry import CHALLENGER, CHAMPION, Version
from minga.training.services import Service


class Finding(Document):
    """One version that somebody should look at."""

    model: str
    version: int
    finding: str
    remedy: str


def find_stale(
    versions: Sequence[Version],
    services: Iterable[Service],
    retired: Iterable[int],
    *,
    now: datetime,
    max_age: timedelta,
) -> tuple[Finding, ...]:
    """Look through all versions of one model, the newest first.

    Args:
        versions: of one model.
        services: where they are and were served.
        retired: numbers of the versions that are retired.
        now: the time.
        max_age: what is older is stale.
    """
    gone = set(retired)
    by_version: dict[int, list[Service]] = {}
    for service in services:
        if service.version.isdecimal():
            by_version.setdefault(int(service.version), []).append(service)
    findings: list[Finding] = []
    for version in versions:
        seen = by_version.get(version.version, [])
        is_retired = version.version in gone
        found = _of_version(version, seen, is_retired=is_retired, now=now, max_age=max_age)
        findings += (
            Finding(model=version.name, version=version.version, finding=words, remedy=remedy)
            for words, remedy in found
        )
    return tuple(findings)


def _of_version(
    version: Version,
    services: list[Service],
    *,
    is_retired: bool,
    now: datetime,
    max_age: timedelta,
) -> list[tuple[str, str]]:
    """Give findings and remedies of one version."""
    age = now - datetime.fromtimestamp(version.created_at_ms / 1000, UTC)
    places = sorted({one.place for one in services if not one.until})
    is_champion = CHAMPION in version.aliases
    found = []
    if is_champion and age > max_age:
        found.append((f"champion, made {age.days} days ago", "retrain: minga run"))
    if is_champion and not places:
        found.append(("champion, served nowhere that is recorded", "minga serve"))
    if places and is_retired:
        found.append((f"retired, but served at {', '.join(places)}", "stop it there"))
    elif places and not is_champion:
        found.append((f"no champion, but served at {', '.join(places)}", "let it follow, or stop"))
    is_idle = not is_champion and CHALLENGER not in version.aliases and not places
    last_used = max([datetime.fromisoformat(one.seen_at) for one in services], default=now - age)
    if is_idle and not is_retired and now - last_used > max_age:
        days = (now - last_used).days
        found.append(
            (f"unused for {days} days", f"minga model retire {version.version} --reason ...")
        )
    return found
