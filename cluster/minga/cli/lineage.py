"""`minga lineage`: from data to production, and back."""

from pathlib import Path
from typing import TYPE_CHECKING

from minga.cli.output import print_json, print_line

if TYPE_CHECKING:
    from minga.training.ancestry import Ancestry, Node


def lineage(
    model: str = "",
    *,
    version: str = "champion",
    data: str = "",
    commit: str = "",
    run: str = "",
    campaign: str = "",
    place: str = "",
    project: Path = Path(),
    state: Path | None = None,
    json: bool = False,
) -> None:
    """Show what a version was made from and where it went; or the same of data, code or a server.

    Data, commits, runs and campaigns may be named by their first letters. Services are those that
    `minga serve` records; with --state, devices as well.

    Example: minga lineage shuttle-anomaly --version 3

    Example: minga lineage --data 9f86d08

    Example: minga lineage --place device/press-7 --state coordinator

    Args:
        model: The model; by default all, or the only one there is.
        version: A version's number or alias.
        data: What was made from this data: its SHA-256.
        commit: What was made from this Git commit.
        run: What came of this MLflow run.
        campaign: What came of this federated campaign.
        place: What was served here, and what that was made from: host:port, or device/NAME.
        project: The project folder.
        state: The coordinator's state folder or an export of its audit log.
        json: Print the part of the graph as JSON: nodes, and edges named as in PROV-O.
    """
    from minga.cluster.ancestry import ancestry_of
    from minga.cluster.project import load
    from minga.training.ancestry import version_id

    loaded = load(project)
    graph = ancestry_of(loaded, model, state)
    asked = {"data": data, "code": commit, "run": run, "campaign": campaign, "service": place}
    chosen = [node for kind, words in asked.items() if words for node in graph.find(kind, words)]  # type: ignore[arg-type]
    if any(asked.values()):
        _require(chosen, asked)
    else:
        registry = loaded.registry()
        name = registry.only_name(model)
        number = registry.get(name, version).version
        chosen = [node for node in graph.nodes if node.id == version_id(name, number)]
    parts = [(node, graph.upstream(node.id), graph.downstream(node.id)) for node in chosen]
    if json:
        print_json(
            [
                {"of": node.id, "made_from": before.model_dump(), "went_into": after.model_dump()}
                for node, before, after in parts
            ]
        )
        return
    for node, before, after in parts:
        _show(node, before, after)


def _require(chosen: "list[Node]", asked: dict[str, str]) -> None:
    from minga.training.errors import RegistryError

    if not chosen:
        words = ", ".join(f"{kind} {name}" for kind, name in asked.items() if name)
        raise RegistryError(f"nothing is registered that has to do with {words}")


def _show(node: "Node", before: "Ancestry", after: "Ancestry") -> None:
    print_line(node.label)
    for title, part in (("made from", before), ("went into", after)):
        others = [other for other in part.nodes if other.id != node.id]
        print_line(f"  {title}:" if others else f"  {title}: nothing that is recorded")
        for other in others:
            print_line(f"    {other.label}")
