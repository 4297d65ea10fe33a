"""`minga audit`: show, verify and export the coordinator's audit log."""

from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from minga.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from minga.federation.audit import Entry, Record

app = App(name="audit", help="Show, verify, export the coordinator's audit log.")

State = Annotated[Path, Parameter(env_var="MINGA_COORDINATOR_STATE")]


@app.command
def show(
    *,
    state: State = Path("coordinator"),
    last: int = 50,
    kind: str = "",
    subject: str = "",
    json: bool = False,
) -> None:
    """Show the newest entries, the oldest of them first. Nothing is verified: see `verify`.

    Example: minga audit show --kind device-revoked --last 10

    Args:
        state: The coordinator's state folder; the coordinator may run.
        last: How many entries; 0 shows all.
        kind: Only entries of this kind, for instance access-refused.
        subject: Only entries of this subject, for instance device/press-7.
        json: Print JSON.
    """
    from minga.federation.audit import canonical

    chosen = (
        entry
        for entry in _entries(_database(state))
        if kind in ("", entry.kind) and subject in ("", entry.subject)
    )
    entries = deque(chosen, maxlen=last or None)
    if json:
        print_json([entry.to_json() for entry in entries])
        return
    rows = [
        (str(entry.sequence), entry.time[:19], entry.kind, entry.subject, canonical(entry.details))
        for entry in entries
    ]
    print_table(("entry", "time (UTC)", "kind", "subject", "details"), rows, empty="no entry")


@app.command
def verify(
    log: Path | None = None,
    *,
    state: State = Path("coordinator"),
    authority: Path | None = None,
    kept: Path | None = None,
    json: bool = False,
) -> None:
    """Check that no entry was altered, removed or moved, and who signed the checkpoints.

    A broken log ends with exit code 36. Take the authority's certificate from where nobody who
    could change the log can change it, for instance a device's `ca.pem`. That the end of a log is
    missing shows in comparison with an earlier export alone: --kept.

    Example: minga audit verify --state ./coordinator --kept /mnt/worm/audit-monday.jsonl

    Args:
        log: An export, or a copy of coordinator.db; the default is the one in the state folder.
        state: The coordinator's state folder; the coordinator may run.
        authority: The federation's certificate; the default is the one in the state folder.
        kept: An earlier export of the same log: all of it must still be there.
        json: Print JSON.
    """
    from minga.federation import audit
    from minga.federation.certificates import load_certificate
    from minga.federation.coordinator.audit_log import read_log
    from minga.federation.coordinator.authority import AUTHORITY_FOLDER
    from minga.federation.coordinator.intermediate import pinned_file

    path = log or _database(state)
    certificate = load_certificate(authority or pinned_file(state / AUTHORITY_FOLDER))
    report = audit.verify(read_log(path), certificate)
    if kept is not None:
        audit.verify(read_log(kept), certificate)
        audit.require_extension(read_log(path), read_log(kept))
    if json:
        print_json(
            {
                "entries": report.num_entries,
                "checkpoints": report.num_checkpoints,
                "signed_until": report.signed_until,
                "last_time": report.last_time,
                "last_hash": report.last_hash.hex(),
            }
        )
        return
    unsigned = report.num_entries - report.signed_until
    print_line(f"entries   {report.num_entries}, each following the one before")
    print_line(f"signed    1 to {report.signed_until}, by {report.num_checkpoints} checkpoints")
    print_line(f"unsigned  {unsigned} at the end, to be signed by the next checkpoint")
    print_line(f"last      {report.last_time}  {report.last_hash.hex()}")


@app.command
def export(file: Path, *, state: State = Path("coordinator")) -> None:
    """Write the log into a new file, a JSON object a line, with the checkpoints to verify it by.

    Example: minga audit export /mnt/worm/audit-monday.jsonl

    Args:
        file: Where to write; a file that exists is not replaced.
        state: The coordinator's state folder; the coordinator may run.
    """
    from minga.federation.audit import to_line
    from minga.federation.errors import FederationError

    try:
        with file.open("x", encoding="ascii", newline="\n") as target:
            try:
                num_lines = sum(
                    target.write(to_line(record) + "\n") > 0
                    for record in _records(_database(state))
                )
            except BaseException:
                file.unlink()  # no half of a log under that name
                raise
    except FileExistsError as error:
        raise FederationError(f"{file} exists; name a new file, and keep the old one") from error
    except OSError as error:
        raise FederationError(f"cannot write {file} ({error.strerror}); name another") from error
    print_line(f"{num_lines} lines in {file}")


def _database(state: Path) -> Path:
    from minga.federation.coordinator.store import DATABASE_FILE

    return state / DATABASE_FILE


def _records(path: Path) -> "Iterator[Record]":
    from minga.federation.coordinator.audit_log import read_log

    return read_log(path)


def _entries(path: Path) -> "Iterator[Entry]":
    from minga.federation.audit import Entry

    return (record for record in _records(path) if isinstance(record, Entry))
