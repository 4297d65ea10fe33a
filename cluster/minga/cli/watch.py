"""`minga watch`: what the monitor knows of served models, its alarms, and labels for them."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from minga.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from minga.inference.monitor.alarms import Alarm
    from minga.inference.monitor.keeper import Windows
    from minga.inference.monitor.store import Store
    from minga.inference.monitor.summary import ModelSummary

app = App(name="watch", help="Show drift, performance and alarms of served models; take labels.")

Folder = Annotated[Path | None, Parameter(env_var="MINGA_MONITOR_FOLDER")]

NUM_FINDINGS = 12
"""How many findings of a version are shown without `--all`."""


@app.command
def status(
    *,
    project: Path = Path(),
    folder: Folder = None,
    all: Annotated[bool, Parameter(negative=())] = False,  # noqa: A002 - the option's name
    html: Path | None = None,
    json: bool = False,
) -> None:
    """Show how the traffic of each served version differs from what it was trained on.

    An alarm takes what is significant and large, twice in a row; see the page on monitoring in the
    documentation. The server may run meanwhile.

    Example: minga watch status --project plant

    Example: minga watch status --folder press-7/monitor --html watch.html

    Args:
        project: The project folder.
        folder: The monitor's folder: a device's is `monitor` in its own. By default the project's.
        all: Show every column, not only those that moved most.
        html: Write a page with the course of every column to this file.
        json: Print JSON.
    """
    from minga.inference.monitor.summary import summarise

    with _store(_folder(project, folder)) as store:
        summaries = summarise(store)
        if html is not None:
            from minga.cluster.monitor_page import render

            html.write_text(render(store), encoding="utf-8")
    if json:
        print_json([summary.to_json() for summary in summaries])
        return
    for summary in summaries:
        _show(summary, None if all else NUM_FINDINGS)
    if html is not None:
        print_line(f"written to {html}")


@app.command
def alarms(
    *,
    project: Path = Path(),
    folder: Folder = None,
    after: int = 0,
    model: str = "",
    standing: Annotated[bool, Parameter(negative=())] = False,
    json: bool = False,
) -> None:
    """Show the alarm log: one line for each alarm that was raised or cleared, oldest first.

    Numbers only rise, so whoever remembers the last one misses nothing: --after.

    Example: minga watch alarms --after 41 --json

    Args:
        project: The project folder.
        folder: The monitor's folder; by default the project's.
        after: Only alarms with a higher number.
        model: Only alarms of this model.
        standing: Only alarms that were not cleared since.
        json: Print JSON.
    """
    from minga.inference.monitor.alarms import AlarmLog

    log = AlarmLog(_folder(project, folder))
    found = log.standing() if standing else log.read(after=after, model=model)
    found = tuple(alarm for alarm in found if alarm.sequence > after and model in ("", alarm.model))
    if json:
        print_json([alarm.to_json() for alarm in found])
        return
    _show_alarms(found)


@app.command
def labels(
    model: str,
    file: Path,
    /,
    *,
    project: Path = Path(),
    folder: Folder = None,
    json: bool = False,
) -> None:
    """Tell what turned out to be right, joined to the answers by the requests' ids.

    The file is CSV with the columns id and label, and row where requests had several. A request
    has an id if its caller gave it one (`"id"` in the protocol). Real performance is judged over
    as many labels as a window has rows, and errors are watched for concept drift. Labels that were
    taken already, or whose answer is not known, are counted and left out.

    Example: minga watch labels machine-failure monday.csv

    Args:
        model: The model's name.
        file: The labels.
        project: The project folder.
        folder: The monitor's folder; by default the project's.
        json: Print JSON.
    """
    from minga.inference.monitor.labels import LabelDesk, read_labels
    from minga.serving.concept_drift import find_change

    with _store(_folder(project, folder)) as store:
        desk = LabelDesk(store, model, _windows(project), find_change=find_change)
        report = desk.take(read_labels(file))
    if json:
        print_json(
            {
                "joined": report.joined,
                "unknown": report.unknown,
                "windows": report.windows,
                "performance": {
                    one.metric: [one.value, one.reference] for one in report.performance
                },
                "alarms": [alarm.to_json() for alarm in report.alarms],
            }
        )
        return
    print_line(f"{report.joined} labels joined, {report.unknown} without a known answer")
    rows = [(one.metric, f"{one.value:.4g}", f"{one.reference:.4g}") for one in report.performance]
    if rows:
        print_table(("measure", "newest window", "test split"), rows)
    for alarm in report.alarms:
        print_line(str(alarm))


def _folder(project: Path, folder: Path | None) -> Path:
    """Give the monitor's folder: as given, or the project's, or that of a server without one."""
    from minga.cluster.project import FILE, MONITOR_FOLDER, load

    if folder is not None:
        return folder
    if (project / FILE).is_file() or project != Path():
        return load(project).monitor_folder
    return Path(MONITOR_FOLDER)


def _windows(project: Path) -> "Windows | None":
    from minga.cluster.project import FILE, load

    return load(project).serving.monitor.windows if (project / FILE).is_file() else None


@contextmanager
def _store(folder: Path) -> Iterator["Store"]:
    """Open what was remembered, for as long as it is needed."""
    from minga.inference.errors import MonitorError
    from minga.inference.monitor.alarms import DATABASE_FILE
    from minga.inference.monitor.store import Store

    if not (folder / DATABASE_FILE).is_file():
        raise MonitorError(
            f"nothing was watched yet in {folder}: `minga serve` watches what it serves, and "
            "`minga device run` too, in `monitor` of its folder"
        )
    with closing(Store(folder)) as store:
        yield store


def _show(summary: "ModelSummary", most: int | None) -> None:
    if not summary.windows:
        print_line(
            f"model '{summary.model}' version {summary.version}: no full window yet, "
            f"{summary.open_rows} rows"
        )
        return
    print_line(
        f"model '{summary.model}' version {summary.version}: {summary.windows} windows, the newest "
        f"of {summary.rows} rows until {_time(summary.ended)}; {summary.outlier_share:.1%} outliers"
    )
    ranked = sorted(summary.findings, key=lambda row: (not row.counts, row.p_value))
    raised = set(summary.standing)
    rows = [
        (
            row.kind,
            row.subject,
            row.statistic,
            f"{row.value:.3g}",
            f"{row.limit:.3g}",
            f"{row.p_value:.2g}",
            "ALARM" if (row.kind, row.subject) in raised else "moved" if row.counts else "",
        )
        for row in ranked[:most]
    ]
    print_table(("about", "of", "statistic", "value", "limit", "by luck", ""), rows)
    for title, measures in (
        ("estimated", summary.estimates),
        ("measured", summary.performance),
    ):
        for metric, (now, then) in measures.items():
            print_line(f"  {metric} {title}: {now:.4g}, on the test split {then:.4g}")


def _show_alarms(found: tuple["Alarm", ...]) -> None:
    rows = [
        (
            str(alarm.sequence),
            _time(alarm.at),
            f"{alarm.model} {alarm.version}",
            "raised" if alarm.is_raised else "cleared",
            alarm.kind.value,
            alarm.subject,
            f"{alarm.statistic} {alarm.value:.3g}",
            _time(alarm.since),
        )
        for alarm in found
    ]
    columns = ("alarm", "time (UTC)", "model", "", "about", "of", "value", "since (UTC)")
    print_table(columns, rows, empty="no alarm")


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")
