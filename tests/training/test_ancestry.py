"""Lineage in both directions and ageing, over versions that are told, and over real ones."""

from datetime import UTC, datetime, timedelta

import pytest

from minga.training.ageing import Limits, Wear, find_stale
from minga.training.ancestry import build_ancestry, version_id
from minga.training.bundle import LINEAGE, Digests
from minga.training.lineage import Campaign, Code, Environment, Lineage
from minga.training.registry import Version
from minga.training.services import Service

NOW = datetime(2026, 11, 23, tzinfo=UTC)
ENVIRONMENT = Environment(digest="e", python="3.11", minga="0", torch="2", machine="x86_64")


def version(number, *, aliases=(), age_days=1):
    created = NOW - timedelta(days=age_days)
    return Version(
        name="blobs",
        version=number,
        run_id=f"run{number}",
        blessed=True,
        aliases=tuple(aliases),
        created_at_ms=int(created.timestamp() * 1000),
        digests=Digests(onnx="o", weights="w", bundle="b"),
        tags={},
    )


def lineage(*, data="d1", commit="c1", parent=None, campaign=None):
    return Lineage(
        task="blobs",
        reference="task.py:Blobs",
        origin="federated" if campaign else "central",
        params={},
        seed=0,
        source="data.csv",
        data_digest=data,
        num_examples=10,
        code=Code(commit=commit, task_sha256="t"),
        environment=ENVIRONMENT,
        parent_version=parent,
        campaign=campaign,
        created_at="2026-11-23",
    )


def service(number, *, place="host:8000", until="", seen_days_ago=0.0):
    seen = (NOW - timedelta(days=seen_days_ago)).isoformat()
    return Service(
        model="blobs",
        version=str(number),
        place=place,
        onnx_sha256="o",
        since="2026-01-01T00:00:00+00:00",
        until=until,
        seen_at=seen,
    )


@pytest.fixture(scope="module")
def graph():
    """Version 1 from data d1, 2 federated from it, 3 from other data; 1 and 2 were served."""
    campaign = Campaign(name="c-7", rounds=3, cohort=8)
    return build_ancestry(
        [
            (version(1), lineage()),
            (version(2), lineage(parent=1, campaign=campaign, data="test")),
            (version(3), lineage(data="d2", commit="c2")),
        ],
        [service(1, until="2026-02-01T00:00:00+00:00"), service(2, place="device/press-7")],
    )


def names(part):
    return {node.id for node in part.nodes}


def test_forward_from_data_to_every_place(graph):
    """What was made from data: versions, those derived from them, and where they served."""
    (data,) = graph.find("data", "d1")
    reached = names(graph.downstream(data.id))
    assert {version_id("blobs", 1), version_id("blobs", 2)} <= reached
    assert version_id("blobs", 3) not in reached
    places = {name.split("/blobs/")[0] for name in reached if name.startswith("service:")}
    assert places == {"service:host:8000", "service:device/press-7"}


def test_back_from_a_device_to_the_data(graph):
    """What a device runs leads back to campaign, parent, run, code and the parent's data."""
    (place,) = graph.find("service", "device/press-7")
    made_from = names(graph.upstream(place.id))
    assert {"campaign:c-7", version_id("blobs", 1), "run:run1", "data:d1", "code:c1/t"} <= made_from
    assert not {"data:d2", version_id("blobs", 3)} & made_from


def test_edges_are_those_of_prov(graph):
    """Arrows of a part lie inside of it, and are named as in PROV-O."""
    part = graph.upstream(version_id("blobs", 2))
    assert {edge.relation for edge in part.edges} == {"used", "wasGeneratedBy", "wasDerivedFrom"}
    assert {end for edge in part.edges for end in (edge.source, edge.target)} <= names(part)


def test_services_of_unknown_versions_are_kept():
    """What was served and is in no registry any more is in the graph nevertheless."""
    graph = build_ancestry([], [service(9)])
    assert version_id("blobs", 9) in names(graph)


def test_real_versions_form_a_graph(registry, register):
    """What the registry carries is enough to build it."""
    found = register()
    stored = Lineage.read(registry.fetch("blobs", found.version) / LINEAGE)
    graph = build_ancestry([(found, stored)], [])
    assert names(graph.upstream(version_id("blobs", 1))) >= {"campaign:c1", f"run:{found.run_id}"}


def findings(versions, services=(), retired=()):
    max_age = timedelta(days=90)
    found = find_stale(versions, services, retired, now=NOW, limits=Limits(max_age=max_age))
    return [(one.version, one.finding) for one in found]


def test_what_is_worn_is_found():
    """A champion that has answered more rows than it may, or is worse by labels, is stale."""
    champion = version(1, aliases=["champion"])
    limits = Limits(max_age=timedelta(days=90), max_rows=1000)

    def reasons(limits=limits, **wear):
        found = find_stale(
            [champion], [service(1)], (), now=NOW, limits=limits, wear={1: Wear(**wear)}
        )
        return [one.finding for one in found]

    assert reasons(rows=1000) == []
    assert reasons(rows=1001, worse=("f1",)) == [
        "champion, has answered 1001 rows",
        "champion, its f1 is worse by labels",
    ]
    assert reasons(Limits(max_age=timedelta(days=90)), rows=10**9) == []


@pytest.mark.parametrize(
    ("one", "services", "retired", "expected"),
    [
        (version(1, aliases=["champion"]), [service(1)], [], []),
        (
            version(1, aliases=["champion"], age_days=100),
            [service(1)],
            [],
            ["champion, made 100 days ago"],
        ),
        (
            version(1, aliases=["champion"]),
            [],
            [],
            ["champion, served nowhere that is recorded"],
        ),
        (version(2), [service(2)], [], ["no champion, but served at host:8000"]),
        (version(2), [service(2)], [2], ["retired, but served at host:8000"]),
        (version(2, age_days=91), [], [], ["unused for 91 days"]),
        (version(2, age_days=91), [], [2], []),
        (version(2, age_days=91, aliases=["challenger"]), [], [], []),
        (version(2, age_days=400), [service(2, until="x", seen_days_ago=5)], [], []),
        (
            version(2, age_days=400),
            [service(2, until="x", seen_days_ago=95)],
            [],
            ["unused for 95 days"],
        ),
    ],
    ids=lambda value: None,
)
def test_what_ages_is_found(one, services, retired, expected):
    """Old champions, services of what should serve no more, and versions that nobody uses."""
    assert [words for _, words in findings([one], services, retired)] == expected
