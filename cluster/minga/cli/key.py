"""`minga key`: who may ask the models that this machine serves."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from cyclopts.validators import Number

from minga.cli.output import print_json, print_line, print_note, print_table
from minga.inference.keys import Role

if TYPE_CHECKING:
    from minga.serving.key_store import KeyStore

app = App(name="key", help="Make, list, revoke API keys of served models.")

Days = Annotated[float | None, Parameter(validator=Number(gt=0, lte=36_500))]
Rate = Annotated[float | None, Parameter(validator=Number(gt=0, lte=1e9))]


@app.command
def create(
    name: str,
    *,
    role: Role = Role.CALLER,
    days: Days = None,
    rate: Rate = None,
    burst: Annotated[int | None, Parameter(validator=Number(gte=1))] = None,
    file: Path | None = None,
    project: Path | None = None,
) -> None:
    """Make an API key and show it, once; only a hash of it is kept.

    Servers that have started with the same file let it in within a second. The first key of a
    project makes the file: `minga serve` wants keys from its next start on.

    Example: minga key create web-shop --days 90 --rate 50

    Example: minga key create prometheus --role monitor

    Args:
        name: Whose key it is.
        role: `caller` asks models, `monitor` reads metrics and statistics, `operator` does both
            and loads and unloads models where the server allows that.
        days: How long it counts; by default until it is revoked.
        rate: How many requests a second it may make on average, at each replica; by default any.
        burst: How many of them at once; by default those of one second.
        file: The file of keys; by default the project's.
        project: The project folder; by default this one.
    """
    store = _store(file, project)
    text, record = store.create(name, role=role, days=days, requests_per_s=rate, burst=burst)
    until = f"until {record.expires_at:%Y-%m-%d %H:%M} UTC" if record.expires_at else "for good"
    print_note(f"key {record.id} of {name!r} counts {until}; it is not shown again:")
    print_line(text)


@app.command(name="list")
def list_(*, file: Path | None = None, project: Path | None = None, json: bool = False) -> None:
    """List keys: whose they are, what they may do, whether they count. Never the keys themselves.

    Example: minga key list --json

    Args:
        file: The file of keys; by default the project's.
        project: The project folder; by default this one.
        json: Print JSON.
    """
    found = _store(file, project).list()
    if json:
        rows = [record.model_dump(exclude={"hash"}) | {"state": state} for record, state in found]
        print_json(rows)
        return
    print_table(
        ("id", "name", "role", "state", "made", "expires", "requests/s"),
        [
            (
                record.id,
                record.name,
                record.role,
                state,
                f"{record.created_at:%Y-%m-%d}",
                f"{record.expires_at:%Y-%m-%d}" if record.expires_at else "never",
                "any" if record.requests_per_s is None else f"{record.requests_per_s:g}",
            )
            for record, state in found
        ],
    )


@app.command
def revoke(key: str, *, file: Path | None = None, project: Path | None = None) -> None:
    """Let a key count no more; servers refuse it within a second.

    Example: minga key revoke web-shop

    Args:
        key: Its name or its id.
        file: The file of keys; by default the project's.
        project: The project folder; by default this one.
    """
    record = _store(file, project).revoke(key)
    print_line(f"key {record.id} of {record.name!r} is revoked")


def _store(file: Path | None, project: Path | None) -> "KeyStore":
    """Open the file that is named, or the project's."""
    from minga.serving.key_store import KeyStore

    if file is None:
        from minga.cluster.project import load

        file = load(project or Path()).keys_file
    return KeyStore(file)
