"""`minga status`: what runs, in which versions."""

from pathlib import Path
from typing import Any

from minga.cli.output import print_json, print_line, print_table


def status(
    *, project: Path = Path(), state: Path = Path("coordinator"), json: bool = False
) -> None:
    """Show what runs where: registered versions, central serving, coordinator, devices.

    Example: minga status --project plant --state coordinator

    Args:
        project: The project folder.
        state: The coordinator's state folder, or an operator's identity folder.
        json: Print JSON.
    """
    from minga.cluster.project import load
    from minga.cluster.status import gather

    parts = gather(load(project), state)
    if json:
        print_json(parts)
        return
    _show_registry(parts["registry"])
    _show_serving(parts["serving"])
    _show_federation(parts["federation"])


def _show_registry(part: dict[str, Any]) -> None:
    print_line(f"registry    {part['uri']}")
    rows = [
        (
            row["model"],
            str(row["version"]),
            ", ".join(row["aliases"]) or "-",
            "passed" if row["blessed"] else "refused",
        )
        for row in part["models"]
    ]
    if rows:
        print_table(("model", "version", "aliases", "gates"), rows)
    _note(part)


def _show_serving(part: dict[str, Any]) -> None:
    print_line(f"serving     {part['url']}  {'ready' if part['ready'] else 'not ready'}")
    rows = [(row["model"], ", ".join(row.get("versions", ()))) for row in part["models"]]
    if rows:
        print_table(("model", "versions"), rows)
    _note(part)


def _show_federation(part: dict[str, Any]) -> None:
    from minga.cluster.fleet import privacy_note

    if not part["running"]:
        print_line(f"federation  {part['state']}  not running")
        _note(part)
        return
    connected = f"{part['num_connected']} of {part['num_devices']} devices connected"
    print_line(f"federation  {part['address']}  {connected}")
    for campaign in part["campaigns"]:
        committed = sum(
            round_["stage"] == "committed" and round_["work"] != "evaluation"
            for round_ in campaign["rounds"]
        )
        parts = [
            campaign["state"],
            f"{committed} of {campaign['num_rounds']} rounds",
            privacy_note(campaign["privacy"]),
        ]
        told = ", ".join(filter(None, parts))
        print_line(f"  campaign {campaign['campaign']}: {told}  {campaign['reason']}".rstrip())
    rows = [
        (
            row["device"],
            row["group"],
            row["state"],
            f"{row['model']} v{row['model_version']}" if row["model"] else "-",
            str(row["rounds_counted"]),
        )
        for row in part["devices"]
    ]
    print_table(
        ("device", "group", "state", "model", "rounds"),
        rows,
        empty="  no device is enrolled; make a token with: minga coordinator token",
    )


def _note(part: dict[str, Any]) -> None:
    if part["note"]:
        print_line(f"  {part['note']}")
