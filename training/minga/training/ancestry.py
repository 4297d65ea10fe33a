"""Lineage in both directions: from data, code and runs through versions to where they served.

The graph is built from what every version carries (`lineage.json`) and from the records of
services. Its arrows follow time: what something was made from points at it. The relations are those
of PROV-O (W3C 2013): a version *used* data and code, *wasGeneratedBy* a run or a campaign,
*wasDerivedFrom* its parent; a service *used* a version.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Literal

from minga.training.document import Document
from minga.training.lineage import Lineage
from minga.training.registry import Version
from minga.training.services import Service

Add = Callable[["NodeKind", str, str], str]
"""From kind, name and label to the node's id; the node is made if it is new."""

NodeKind = Literal["data", "code", "run", "campaign", "version", "service"]


class Node(Document):
    """A thing with a name of its own, such as `version:blobs/3` or `data:<sha256>`."""

    id: str
    kind: NodeKind
    label: str
    """What a person wants to read of it."""


class Edge(Document):
    """`target` was made from `source`, by a relation of PROV-O."""

    source: str
    target: str
    relation: str


class Ancestry(Document):
    """A lineage graph, or a part of one."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def upstream(self, node_id: str) -> "Ancestry":
        """Give all that a node was made from, itself included."""
        return self._reach(node_id, {edge: (edge.target, edge.source) for edge in self.edges})

    def downstream(self, node_id: str) -> "Ancestry":
        """Give all that was made from a node, itself included."""
        return self._reach(node_id, {edge: (edge.source, edge.target) for edge in self.edges})

    def find(self, kind: NodeKind, prefix: str) -> tuple[Node, ...]:
        """Give the nodes of a kind whose name, behind the kind, begins so."""
        return tuple(node for node in self.nodes if node.id.startswith(f"{kind}:{prefix}"))

    def _reach(self, start: str, steps: dict[Edge, tuple[str, str]]) -> "Ancestry":
        following: dict[str, list[str]] = {}
        for source, target in steps.values():
            following.setdefault(source, []).append(target)
        reached, waiting = {start}, deque([start])
        while waiting:
            new = set(following.get(waiting.popleft(), ())) - reached
            reached |= new
            waiting.extend(sorted(new))
        return Ancestry(
            nodes=tuple(node for node in self.nodes if node.id in reached),
            edges=tuple(e for e in self.edges if e.source in reached and e.target in reached),
        )


def version_id(model: str, version: int | str) -> str:
    """Name a version's node."""
    return f"version:{model}/{version}"


def build_ancestry(
    versions: Iterable[tuple[Version, Lineage]], services: Iterable[Service]
) -> Ancestry:
    """Put versions and services together.

    Args:
        versions: of any models, each with what it carries.
        services: where versions were served; those of unknown versions keep their version's name.
    """
    nodes: dict[str, Node] = {}
    edges: list[Edge] = []

    def add(kind: NodeKind, name: str, label: str) -> str:
        node = Node(id=f"{kind}:{name}", kind=kind, label=label)
        nodes.setdefault(node.id, node)
        return node.id

    for version, lineage in sorted(versions, key=lambda pair: (pair[0].name, pair[0].version)):
        aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
        verdict = "passed" if version.blessed else "refused"
        target = add(
            "version",
            f"{version.name}/{version.version}",
            f"{version.name} version {version.version}{aliases}, {lineage.origin}, "
            f"gates {verdict}, {lineage.created_at}",
        )
        edges += [
            Edge(source=source, target=target, relation=relation)
            for source, relation in _origins(version, lineage, add)
        ]
    for service in services:
        until = service.until or "now"
        target = add(
            "service",
            f"{service.place}/{service.model}/{service.since}",
            f"{service.place} served {service.model} version {service.version} "
            f"from {service.since} until {until}",
        )
        source = add(
            "version",
            f"{service.model}/{service.version}",
            f"{service.model} version {service.version}, not in this registry",
        )
        edges.append(Edge(source=source, target=target, relation="used"))
    return Ancestry(nodes=tuple(nodes.values()), edges=tuple(edges))


def _origins(version: Version, lineage: Lineage, add: Add) -> Iterable[tuple[str, str]]:
    """Give what a version was made from, with the relations."""
    code, data = lineage.code, lineage.data_digest
    if lineage.campaign is None:
        words = f"data {lineage.source}, {lineage.num_examples} examples, sha256 {data}"
        yield add("data", data, words), "used"
    else:
        campaign = lineage.campaign
        words = f"campaign {campaign.name}: {campaign.rounds} rounds, {campaign.cohort} devices"
        yield add("campaign", campaign.name, words), "wasGeneratedBy"
        words = f"data {lineage.source} that it was judged on, sha256 {data}"
        yield add("data", data, words), "used"
    dirty = " with uncommitted changes" if code.dirty else ""
    words = f"commit {code.commit}{dirty}" if code.commit else "code outside of Git"
    words += f", {lineage.reference} sha256 {code.task_sha256}"
    yield add("code", f"{code.commit or 'none'}/{code.task_sha256}", words), "used"
    yield add("run", version.run_id, f"run {version.run_id}"), "wasGeneratedBy"
    if lineage.parent_version is not None:
        parent = f"{version.name}/{lineage.parent_version}"
        yield (
            add("version", parent, f"{version.name} version {lineage.parent_version}"),
            ("wasDerivedFrom"),
        )
