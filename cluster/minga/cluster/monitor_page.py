"""`minga watch status --html`: one page with the course of everything that is watched.

The page loads nothing: no script, no font, no image from elsewhere. It shows counts and shares,
never a row.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from minga.inference.monitor.store import Store, WindowRow
from minga.inference.monitor.summary import FindingRow, ModelSummary, findings_of, summarise

TEMPLATE = Path(__file__).with_name("monitor_page.html.j2")

NUM_WINDOWS = 60
WIDTH, HEIGHT = 220, 44


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """One statistic over the newest windows.

    Attributes:
        now: in the newest of them.
        points: of a line in an SVG picture of WIDTH by HEIGHT.
        limit_y: where its limit lies in the picture.
        is_alarm: whether an alarm of its subject stands.
    """

    now: FindingRow
    points: str
    limit_y: float
    is_alarm: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One version as the page shows it."""

    summary: ModelSummary
    courses: tuple[Course, ...]


def render(store: Store) -> str:
    """Write the page of all that a store knows."""
    from jinja2 import Environment, StrictUndefined  # noqa: PLC0415 - only this page needs it

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["time"] = _time
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    pictures = [
        Picture(summary=summary, courses=_courses(store, summary)) for summary in summarise(store)
    ]
    return template.render(pictures=pictures, width=WIDTH, height=HEIGHT)


def _courses(store: Store, summary: ModelSummary) -> tuple[Course, ...]:
    seen: list[tuple[str, str, str, FindingRow]] = []
    for source in ("traffic", "labels"):
        state = store.state(summary.model, summary.version, source)
        windows: tuple[WindowRow, ...] = store.windows(state, last=NUM_WINDOWS) if state else ()
        for window in windows:
            seen += [(row.kind, row.subject, row.statistic, row) for row in findings_of(window)]
    seen.sort(key=lambda item: item[:3])
    raised = set(summary.standing)
    courses = [
        _course([item[3] for item in items], is_alarm=(kind, subject) in raised)
        for (kind, subject, _), items in groupby(seen, key=lambda item: item[:3])
    ]
    return tuple(sorted(courses, key=lambda course: (not course.is_alarm, course.now.p_value)))


def _course(rows: list[FindingRow], *, is_alarm: bool) -> Course:
    limit = rows[-1].limit
    top = max([abs(row.value) for row in rows] + [limit * 1.25, 1e-9])
    step = WIDTH / max(len(rows) - 1, 1)
    points = " ".join(
        f"{place * step:.1f},{HEIGHT * (1 - abs(row.value) / top):.1f}"
        for place, row in enumerate(rows)
    )
    return Course(
        now=rows[-1], points=points, limit_y=HEIGHT * (1 - limit / top), is_alarm=is_alarm
    )


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
