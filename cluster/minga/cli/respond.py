"""`minga respond`: alarms that act, their story, and what people say to it."""

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from minga.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from minga.cluster.response.policy import Entry

app = App(name="respond", help="Let alarms retrain the champion, within limits; tell the story.")


@app.command
def run(*, project: Path = Path()) -> None:
    """Listen for alarms until Ctrl-C, and let those act that [respond] names.

    Alarms come from the monitor of what `minga serve` answers, and from Alertmanager's webhook
    (`minga observe` writes its configuration). An alarm opens a case: the champion is trained
    anew, or a campaign is started, and what comes out takes the gates and is promoted if it passes.
    There is one case at a time, a cool-down after each, a budget, and the approval of a person
    where `[respond] approval` says so. Stopped or killed at any moment, a case goes on at the next
    start, and nothing in it happens twice.

    Example: minga respond run --project plant

    Args:
        project: The project folder.
    """
    from minga.cli.services import run_service
    from minga.cluster.errors import ProjectError
    from minga.cluster.project import load
    from minga.cluster.response.receiver import TOKEN_FILE
    from minga.cluster.response.responder import folder_of, respond

    loaded = load(project)
    if not loaded.respond.alarms:
        raise ProjectError(
            "[respond] names no alarm that may act; name some in minga.toml, such as: "
            'alarms = ["performance"]'
        )

    def announce(url: str) -> None:
        print_line(f"alarms: {', '.join(loaded.respond.alarms)}; action: {loaded.respond.action}")
        print_line(f"token in {folder_of(loaded) / TOKEN_FILE}")
        print_line(f"ready at {url}; Ctrl-C stops listening, an open case goes on later")
        _flush()

    run_service(respond(loaded, announce))


@app.command
def story(*, project: Path = Path(), case: int | None = None, json: bool = False) -> None:
    """Tell what was heard, decided and done, oldest first.

    Example: minga respond story --case 3

    Args:
        project: The project folder.
        case: Only this case.
        json: Print JSON.
    """
    from minga.cluster.project import load
    from minga.cluster.response.responder import open_journal

    entries = open_journal(load(project)).story(case)
    if json:
        print_json([_plain(entry) for entry in entries])
        return
    print_table(
        ("at", "case", "what", "how"),
        [
            (_time(entry.at), str(entry.case or "-"), entry.kind, _words(entry.detail))
            for entry in entries
        ],
        empty="nothing was heard yet; listen with: minga respond run",
    )


@app.command
def approve(case: int, *, project: Path = Path()) -> None:
    """Agree to what a case waits for: the start of its work, or the promotion of its version.

    Example: minga respond approve 3

    Args:
        case: The case, as `minga respond story` shows it.
        project: The project folder.
    """
    from minga.cluster.errors import ResponseError
    from minga.cluster.project import load
    from minga.cluster.response.policy import SIGNATURES, Kind
    from minga.cluster.response.responder import open_journal

    loaded = load(project)
    journal = open_journal(loaded)
    awaited = journal.case(case).awaited(loaded.respond)
    if not awaited:
        raise ResponseError(f"case {case} waits for nobody; see: minga respond story --case {case}")
    if awaited == SIGNATURES:
        version = journal.case(case).done[Kind.JUDGED]["version"]
        raise ResponseError(
            f"case {case} waits for the approvals that [gates] asks for, by other people and with "
            f"their keys: minga model approve {version}"
        )
    journal.approve(case, awaited, by=getpass.getuser())
    print_line(f"case {case}: {awaited} is approved")


@app.command
def dismiss(case: int, *, reason: str, project: Path = Path()) -> None:
    """End an open case without a promotion; work that runs ends with its present step.

    Example: minga respond dismiss 3 --reason "the sensor was replaced"

    Args:
        case: The case, as `minga respond story` shows it.
        reason: Why; it is kept in the story.
        project: The project folder.
    """
    from minga.cluster.project import load
    from minga.cluster.response.policy import Kind
    from minga.cluster.response.responder import open_journal

    journal = open_journal(load(project))
    journal.tell(Kind.DISMISSED, journal.case(case).number, by=getpass.getuser(), reason=reason)
    print_line(f"case {case} is dismissed")


def _plain(entry: "Entry") -> dict[str, Any]:
    return {
        "number": entry.number,
        "at": _time(entry.at),
        "case": entry.case,
        "kind": entry.kind,
        **entry.detail,
    }


def _words(detail: Any) -> str:
    """Write an entry's detail in one line."""
    if isinstance(detail, dict):
        parts = ((name, _words(value)) for name, value in detail.items())
        return ", ".join(f"{name} {text}" for name, text in parts if text)
    if isinstance(detail, list):
        return "; ".join(map(_words, detail))
    return f"{detail:.10g}" if isinstance(detail, float) else str(detail)


def _time(moment: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _flush() -> None:
    import sys

    sys.stdout.flush()
