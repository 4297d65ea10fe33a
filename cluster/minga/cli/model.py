"""`minga model`: registered versions, their verdicts, and which is champion."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App

from minga.cli.output import print_gates, print_json, print_line, print_note, print_table

if TYPE_CHECKING:
    from minga.cluster.project import Project
    from minga.training.registry import Registry, Version

app = App(name="model", help="List, show, promote registered model versions.")


@app.command(name="list")
def list_(*, project: Path = Path(), name: str = "", json: bool = False) -> None:
    """List registered versions, the newest first.

    Example: minga model list --json

    Args:
        project: The project folder.
        name: Only this model.
        json: Print JSON.
    """
    from minga.cluster.project import load

    loaded = load(project)
    rows: list[dict[str, Any]] = []
    if loaded.has_registry:
        registry = loaded.registry()
        names = [name] if name else registry.names()
        rows = [_row(version) for each in names for version in registry.list_versions(each)]
    if json:
        print_json(rows)
        return
    print_table(
        ("model", "version", "aliases", "gates", "origin", "created"),
        [
            (
                row["model"],
                str(row["version"]),
                ", ".join(row["aliases"]) or "-",
                "passed" if row["blessed"] else "refused",
                row["origin"],
                row["created_at"],
            )
            for row in rows
        ],
        empty="no model is registered yet; make one with: minga run",
    )


@app.command
def show(
    which: str = "champion", *, project: Path = Path(), name: str = "", json: bool = False
) -> None:
    """Show a version: where it comes from, what it reaches, and the verdict of each gate.

    Example: minga model show champion

    Args:
        which: A version's number or alias.
        project: The project folder.
        name: The model, if the registry has several.
        json: Print JSON.
    """
    from minga.training.bundle import CARD, GATES, LINEAGE
    from minga.training.gates import GateReport
    from minga.training.lineage import Lineage

    loaded, registry = _opened(project)
    version = registry.get(registry.only_name(name), which)
    folder = registry.fetch(version.name, version.version)
    needed = loaded.gates.approvals
    people = registry.approvals(version.name, version.version).people if needed else ()
    if json:
        report, lineage = GateReport.read(folder / GATES), Lineage.read(folder / LINEAGE)
        details = {"path": folder, **report.model_dump(), "lineage": lineage}
        print_json(_row(version) | details | {"approved_by": people, "approvals_needed": needed})
        return
    if needed:
        print_line(f"{len(people)} of {needed} approvals: {', '.join(people) or 'nobody yet'}")
    aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
    print_line(f"{version.name} version {version.version}{aliases}, files in {folder}\n")
    print_line((folder / CARD).read_text(encoding="utf-8").rstrip())


@app.command
def promote(which: str, *, project: Path = Path(), name: str = "", override: str = "") -> None:
    """Make a version the champion, which is what is served and federated further.

    The version's signed verdict is checked first. A version that its gates refused is refused, and
    so is one that was judged against a champion that is champion no more; a version that was
    champion before may always come back. If two people promote at once, one of them is told.

    Example: minga model promote 3

    Example: minga model promote 3 --override "ticket 1207: the slice has eleven examples"

    With [gates] approvals it needs the approval of other people as well: `minga model approve`.

    Args:
        which: A version's number or alias.
        project: The project folder.
        name: The model, if the registry has several.
        override: Promote it although gates or comparison speak against it, for this reason; the
            reason, who gave it and when are kept in the signed ledger that `minga model history`
            shows. It stands for no approval.
    """
    registry = _registry(project)
    version = registry.promote(registry.only_name(name), which, override=override)
    print_line(f"{version.name} version {version.version} is champion")


@app.command
def approve(
    which: str,
    *,
    project: Path = Path(),
    name: str = "",
    comment: str = "",
    json: bool = False,
) -> None:
    """Approve a version that somebody else registered, with this machine's key.

    With [gates] approvals = 2 in minga.toml a version is promoted only when two people other than
    those who registered and judged it have approved it. Each approves with a key of their own:
    MINGA_SIGNING_KEY names its file. What is signed is this version's files and no others.

    Example: minga model approve 3 --comment "read the card, asked the plant"

    Args:
        which: A version's number or alias.
        project: The project folder.
        name: The model, if the registry has several.
        comment: Is kept with the approval.
        json: Print JSON.
    """
    loaded, registry = _opened(project)
    model = registry.only_name(name)
    found = registry.approve(model, which, comment=comment)
    needed = loaded.gates.approvals
    if json:
        print_json({"approved_by": found.people, "refused": found.refused, "needed": needed})
        return
    version = registry.get(model, which).version
    print_line(f"{model} version {version} is approved by {', '.join(found.people)}")
    print_note(f"{len(found.counted)} approvals, {needed} needed: minga model promote {version}")


@app.command
def judge(which: str, *, project: Path = Path(), json: bool = False) -> None:
    """Judge a version anew, against today's champion, and register it with the new verdict.

    For a version that somebody else's promotion has overtaken, or after the gates' limits or the
    test data have changed. Versions never change: the verdict is on a new one, of equal weights.

    Example: minga model judge 3

    Args:
        which: A version's number or alias.
        project: The project folder.
        json: Print JSON.
    """
    from minga.cli.output import show_progress
    from minga.cluster.pipeline import judge_anew
    from minga.cluster.project import load
    from minga.training.errors import GateError

    with show_progress() as show:
        found = judge_anew(load(project), which, show)
    if json:
        print_json({"model": found.name, "version": found.version, **found.report.model_dump()})
    else:
        print_gates(found.report)
    if not found.report.blessed:
        refused = ", ".join(gate.name for gate in found.report.refused)
        raise GateError(f"version {found.version} is registered as a candidate: {refused}")
    print_note(f"next: minga model promote {found.version}")


@app.command
def history(*, project: Path = Path(), name: str = "", json: bool = False) -> None:
    """Show who promoted or retired which version, when, and why where something spoke against it.

    Every entry's signature is checked, and that none is missing in between.

    Example: minga model history

    Args:
        project: The project folder.
        name: The model, if the registry has several.
        json: Print JSON.
    """
    registry = _registry(project)
    found = registry.decisions(registry.only_name(name))
    if json:
        print_json([decision.model_dump() for decision in found])
        return
    print_table(
        ("at", "version", "was", "champion before", "by", "approved by", "reason"),
        [
            (
                one.at,
                str(one.version),
                one.kind,
                str(one.champion_before or "-"),
                one.by,
                ", ".join(one.approved_by) or "-",
                one.reason or "-",
            )
            for one in found
        ],
        empty="nothing was promoted yet; do it with: minga model promote VERSION",
    )


@app.command
def served(
    *,
    project: Path = Path(),
    name: str = "",
    at: datetime | None = None,
    place: str = "",
    state: Path | None = None,
    json: bool = False,
) -> None:
    """Tell which version was served where and when, on servers and, with --state, on devices.

    Example: minga model served --at 2026-11-23T14:00

    Args:
        project: The project folder.
        name: Only this model.
        at: Only what was served at this time, UTC unless it says otherwise.
        place: Only this place: host:port of a server, or device/NAME.
        state: The coordinator's state folder or an export of its audit log, which tell of devices.
        json: Print JSON.
    """
    from minga.cluster.ancestry import services_everywhere
    from minga.cluster.project import load

    moment = at.replace(tzinfo=at.tzinfo or UTC) if at else None
    found = [
        one
        for one in services_everywhere(load(project), name, state)
        if place in ("", one.place) and (moment is None or one.covers(moment))
    ]
    if json:
        print_json([one.model_dump() for one in found])
        return
    print_table(
        ("model", "version", "place", "since", "until", "last seen"),
        [
            (one.model, one.version, one.place, one.since, one.until or "now", one.seen_at)
            for one in found
        ],
        empty="no such service is recorded; `minga serve` records what it serves",
    )


@app.command
def stale(*, project: Path = Path(), state: Path | None = None, json: bool = False) -> None:
    """Report what ages: old champions, versions that should serve no more, and those to retire.

    Example: minga model stale

    Args:
        project: The project folder; [gates] max_age_days of its minga.toml says what is old.
        state: The coordinator's state folder or an export of its audit log, which tell of devices.
        json: Print JSON.
    """
    from minga.cluster.ancestry import stale_everywhere
    from minga.cluster.project import load

    found = stale_everywhere(load(project), state)
    if json:
        print_json([finding.model_dump() for finding in found])
        return
    print_table(
        ("model", "version", "finding", "remedy"),
        [(one.model, str(one.version), one.finding, one.remedy) for one in found],
        empty="nothing is stale",
    )


@app.command
def retire(which: str, *, reason: str, project: Path = Path(), name: str = "") -> None:
    """Take a version out of use: nobody promotes it again without overriding that.

    Its files stay, for whoever asks later what was served. The champion cannot be retired.

    Example: minga model retire 2 --reason "trained on readings of a broken sensor"

    Args:
        which: A version's number or alias.
        reason: Why; kept in the signed ledger that `minga model history` shows.
        project: The project folder.
        name: The model, if the registry has several.
    """
    registry = _registry(project)
    version = registry.retire(registry.only_name(name), which, reason=reason)
    print_line(f"{version.name} version {version.version} is retired")


@app.command
def key(*, project: Path = Path()) -> None:
    """Print the public key that this machine's verdicts and promotions are signed with.

    Colleagues who share the registry name it in [gates] trusted_keys of minga.toml.

    Example: minga model key

    Args:
        project: The project folder.
    """
    from minga.cluster.project import load

    print_line(load(project).keyring.public_key)


@app.command
def publish(
    which: str = "champion", *, project: Path = Path(), state: Path = Path("coordinator")
) -> None:
    """Offer a version to the devices; each tests it before it runs it, late ones hear of it too.

    Example: minga model publish champion --state coordinator

    Args:
        which: A version's number or alias.
        project: The project folder.
        state: The coordinator's state folder, or an operator's identity folder.
    """
    from minga.cluster.federate import publish as offer
    from minga.cluster.project import load

    num_devices = offer(load(project), state, which)
    print_line(f"offered to {num_devices} connected devices; see: minga device list")


def _registry(project: Path) -> "Registry":
    return _opened(project)[1]


def _opened(project: Path) -> "tuple[Project, Registry]":
    from minga.cluster.project import load
    from minga.training.errors import RegistryError

    loaded = load(project)
    if not loaded.has_registry:
        raise RegistryError("no model is registered yet; make one with: minga run")
    return loaded, loaded.registry()


def _row(version: "Version") -> dict[str, Any]:
    created = datetime.fromtimestamp(version.created_at_ms / 1000, UTC)
    return {
        "model": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "blessed": version.blessed,
        "overridden": version.tags.get("minga.overridden") == "true",
        "origin": version.tags.get("minga.origin", ""),
        "run_id": version.run_id,
        "onnx_sha256": version.digests.onnx,
        "created_at": created.strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
