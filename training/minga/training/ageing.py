"""What ages in a registry: champions, and versions that should serve no more."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

from minga.training.document import Document
from minga.training.registry import CHALLENGER, CHAMPION, Version
from minga.training.services import Service


class Finding(Document):
    """One version that somebody should look at."""

    model: str
    version: int
    finding: str
    remedy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Wear:
    """What a version has been through, as the monitor tells it.

    Attributes:
        rows: how many it has answered.
        worse: in what labels say that it is worse than on the test split, by the alarms that stand.
    """

    rows: int = 0
    worse: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a champion may have been through before it is stale.

    Attributes:
        max_age: since it was made.
        max_rows: that it has answered; 0 for any number.
    """

    max_age: timedelta
    max_rows: int = 0


def why_stale(version: Version, wear: Wear, *, now: datetime, limits: Limits) -> tuple[str, ...]:
    """Say why a champion should be trained anew, in words; nothing if it is as good as new."""
    age = now - datetime.fromtimestamp(version.created_at_ms / 1000, UTC)
    found = [f"made {age.days} days ago"] if age > limits.max_age else []
    if limits.max_rows and wear.rows > limits.max_rows:
        found.append(f"has answered {wear.rows} rows")
    found += [f"its {measure} is worse by labels" for measure in wear.worse]
    return tuple(found)


def find_stale(
    versions: Sequence[Version],
    services: Iterable[Service],
    retired: Iterable[int],
    *,
    now: datetime,
    limits: Limits,
    wear: Mapping[int, Wear] = MappingProxyType({}),
) -> tuple[Finding, ...]:
    """Look through all versions of one model, the newest first.

    Args:
        versions: of one model.
        services: where they are and were served.
        retired: numbers of the versions that are retired.
        now: the time.
        limits: what is beyond is stale.
        wear: what the monitor tells of versions, by number.
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
        found = _of_version(version, seen, is_retired=is_retired, now=now, limits=limits)
        if CHAMPION in version.aliases:
            worn = wear.get(version.version, Wear())
            reasons = why_stale(version, worn, now=now, limits=limits)
            findings += (
                Finding(
                    model=version.name,
                    version=version.version,
                    finding=f"champion, {reason}",
                    remedy="retrain: minga run",
                )
                for reason in reasons
            )
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
    limits: Limits,
) -> list[tuple[str, str]]:
    """Give findings and remedies of one version."""
    age = now - datetime.fromtimestamp(version.created_at_ms / 1000, UTC)
    places = sorted({one.place for one in services if not one.until})
    is_champion = CHAMPION in version.aliases
    found = []
    if is_champion and not places:
        found.append(("champion, served nowhere that is recorded", "minga serve"))
    if places and is_retired:
        found.append((f"retired, but served at {', '.join(places)}", "stop it there"))
    elif places and not is_champion:
        found.append((f"no champion, but served at {', '.join(places)}", "let it follow, or stop"))
    is_idle = not is_champion and CHALLENGER not in version.aliases and not places
    last_used = max([datetime.fromisoformat(one.seen_at) for one in services], default=now - age)
    if is_idle and not is_retired and now - last_used > limits.max_age:
        days = (now - last_used).days
        found.append(
            (f"unused for {days} days", f"minga model retire {version.version} --reason ...")
        )
    return found
