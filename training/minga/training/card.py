"""The model card: what a person reads before trusting a version."""

from minga.training.gates import GateReport
from minga.training.lineage import Lineage
from minga.training.profile import Profile
from minga.training.schema import Schema


def card_of(schema: Schema, profile: Profile, gates: GateReport, lineage: Lineage) -> str:
    """Write a version's card as Markdown."""
    verdict = "passed all gates" if gates.blessed else "did not pass its gates"
    sections = (
        f"# {lineage.task}\n\nThis version {verdict}. {_origin(lineage)}",
        "## Metrics on the test split\n\n" + _metrics(gates),
        "## Gates\n\n" + _gates(gates),
        "## Input and output\n\n" + _interface(schema, profile),
        "## Lineage\n\n" + _lineage(lineage),
    )
    return "\n\n".join(sections) + "\n"


def _origin(lineage: Lineage) -> str:
    if lineage.campaign is None:
        return f"It was trained centrally on {lineage.num_examples} examples."
    campaign = lineage.campaign
    return (
        f"It is the product of federated campaign {campaign.name}: {campaign.rounds} rounds, "
        f"{campaign.cohort} devices in the last, which kept their data, "
        f"from version {lineage.parent_version} on."
    )


def _metrics(gates: GateReport) -> str:
    rows = [f"| {name} | {value:.4f} |" for name, value in sorted(gates.metrics.items())]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _gates(gates: GateReport) -> str:
    rows = [
        f"| {gate.name} | {'passed' if gate.passed else 'refused'} | {gate.seen} | {gate.goal} |"
        for gate in gates.gates
    ]
    return "\n".join(["| gate | verdict | seen | goal |", "|---|---|---|---|", *rows])


def _interface(schema: Schema, profile: Profile) -> str:
    shape = ", ".join(["batch", *map(str, schema.input_shape)])
    lines = [f"`input`: {schema.served_dtype}, shape ({shape}). Columns as seen in training:", ""]
    rows = [
        f"| {column.name} | {column.kind} | {column.low:g} | {column.high:g} | {seen.mean:.4g} |"
        for column, seen in zip(schema.columns, profile.inputs, strict=True)
    ]
    return "\n".join(
        [*lines, "| column | kind | low | high | mean |", "|---|---|---|---|---|", *rows]
    )


def _lineage(lineage: Lineage) -> str:
    code = lineage.code.commit or "outside of a Git repository"
    if lineage.code.dirty:
        code += " with uncommitted changes"
    facts = {
        "created": lineage.created_at,
        "code": code,
        "task file": f"{lineage.reference}, sha256 {lineage.code.task_sha256}",
        "data": f"{lineage.source}, sha256 {lineage.data_digest}",
        "seed": str(lineage.seed),
        "parameters": ", ".join(f"{k} = {v}" for k, v in sorted(lineage.params.items())),
        "parent version": str(lineage.parent_version or "none"),
        "environment": f"Python {lineage.environment.python}, torch {lineage.environment.torch}, "
        f"Minga {lineage.environment.minga}, {lineage.environment.machine}; "
        f"sha256 of all versions {lineage.environment.digest}",
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
