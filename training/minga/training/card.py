"""The model card: what a person reads before trusting a version.

The sections are those of Mitchell et al. (FAT* 2019) as far as a program can fill them. The head is
that of Hugging Face's model cards, so their tools read results and tags; `card.json` is the same
content for other programs.
"""

import re
from typing import Any

from minga.training.document import Document
from minga.training.gates import Gate, GateReport
from minga.training.lineage import Lineage
from minga.training.profile import Profile
from minga.training.schema import Schema
from minga.training.space import architecture_of, is_network


class Card(Document):
    """All that a version's card tells."""

    description: str
    data_schema: Schema
    profile: Profile
    gates: GateReport
    lineage: Lineage

    def markdown(self) -> str:
        """Write the card for people, with Hugging Face's head."""
        import yaml

        head = yaml.safe_dump(self.metadata(), sort_keys=False, allow_unicode=True)
        lineage = self.lineage
        verdict = "passed all gates" if self.gates.blessed else "did not pass its gates"
        sections = (
            f"# {lineage.task}\n\n{self.description}\n\nThis version {verdict}. {_origin(lineage)}",
            "## Intended use\n\n" + self._use(),
            "## Metrics on the test split\n\n" + _metrics(self.gates),
            "## Slices\n\n" + _gates(self.gates, "slice "),
            "## Groups\n\n" + _groups(self.gates),
            "## Gates\n\n" + _gates(self.gates),
            "## Limits\n\n" + self._limits(),
            "## Input and output\n\n" + _interface(self.data_schema, self.profile),
            "## Training data\n\n" + self._data(),
            "## Lineage\n\n" + _lineage(lineage),
        )
        # Markdown lets HTML through, and a column may be called like a script.
        body = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", "\n\n".join(sections))
        return f"---\n{head}---\n\n{body}\n"

    def metadata(self) -> dict[str, Any]:
        """Give the head: tags, and the results as a Hugging Face `model-index`."""
        kind = self._kind()
        result = {
            "task": {"type": kind},
            "dataset": {
                "name": self.lineage.source,
                "type": "private",
                "split": "test",
                "revision": self.lineage.data_digest,
            },
            "metrics": [
                {"type": name, "value": value, "name": name}
                for name, value in sorted(self.gates.metrics.items())
            ],
        }
        return {
            "library_name": "onnx",
            "tags": ["minga", "onnx", self.lineage.origin],
            **({"pipeline_tag": kind} if kind != "other" else {}),
            "model-index": [{"name": self.lineage.task, "results": [result]}],
        }

    def _kind(self) -> str:
        """Name what the model does, in Hugging Face's words, as far as that is known."""
        if len(self.data_schema.input_shape) != 1 or self.gates.calibration is None:
            return "other"
        return "tabular-classification"

    def _use(self) -> str:
        names = [column.name for column in self.data_schema.columns]
        few = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        return (
            f"For inputs like those of its training data ({few}), checked by `minga data check`. "
            "It was measured on no others."
        )

    def _limits(self) -> str:
        found = self.gates.calibration
        kind = architecture_of(self.lineage.params)
        lines = []
        if not is_network(self.lineage.params):
            lines.append(
                f"- The model is no network but {kind!r}: it has no weights to federate or to "
                "train further."
            )
        lines += [f"- Refused by: {gate.name}: {gate.seen}" for gate in self.gates.refused]
        lines += [
            f"- With {gate.name}: {gate.seen}"
            for gate in self.gates.gates
            if gate.name.startswith("noise of ") or gate.name.endswith(" values missing")
        ]
        if found is None:
            lines.append("- Calibration was not measured: the Task gives no probabilities.")
        else:
            lines.append(
                f"- Calibration: expected error {found.expected_error:.4f}, largest "
                f"{found.largest_error:.4f}, Brier score {found.brier:.4f}."
            )
        return "\n".join(lines)

    def _data(self) -> str:
        targets = ", ".join(
            f"{column.name}: mean {column.mean:.4g}, deviation {column.deviation:.4g}"
            for column in self.profile.targets
        )
        return (
            f"{self.profile.num_examples} examples from {self.lineage.source}; targets {targets}."
        )


def _origin(lineage: Lineage) -> str:
    if lineage.campaign is None:
        begun = f", from version {lineage.parent_version} on" if lineage.parent_version else ""
        return f"It was trained centrally on {lineage.num_examples} examples{begun}."
    campaign = lineage.campaign
    return (
        f"It is the product of federated campaign {campaign.name}: {campaign.rounds} rounds, "
        f"{campaign.cohort} devices in the last, which kept their data, "
        f"from version {lineage.parent_version} on."
    )


def _metrics(gates: GateReport) -> str:
    rows = [f"| {_cell(name)} | {value:.4f} |" for name, value in sorted(gates.metrics.items())]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _gates(gates: GateReport, prefix: str = "") -> str:
    chosen = [gate for gate in gates.gates if gate.name.startswith(prefix)]
    if not chosen:
        return "The Task names none."
    return "\n".join(["| gate | verdict | seen | goal |", "|---|---|---|---|", *map(_row, chosen)])


def _groups(gates: GateReport) -> str:
    if not gates.fairness:
        return "The Task names none, or gives no probabilities to compare them by."
    rows = [
        f"| {_cell(found.attribute)} | {_cell(group)} | {figures['examples']:g} "
        f"| {_rate(figures['selection_rate'])} | {_rate(figures['true_positive_rate'])} "
        f"| {_rate(figures['false_positive_rate'])} |"
        for found in gates.fairness
        for group, figures in found.groups.items()
    ]
    gaps = [
        f"- {found.attribute}: demographic parity difference {found.selection_gap:.4f}, "
        f"equalised odds difference {found.odds_gap:.4f}"
        for found in gates.fairness
    ]
    head = "| attribute | group | examples | selected | true positives | false positives |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows, "", *gaps])


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _row(gate: Gate) -> str:
    verdict = "passed" if gate.passed else "refused"
    return f"| {_cell(gate.name)} | {verdict} | {_cell(gate.seen)} | {_cell(gate.goal)} |"


def _cell(text: str) -> str:
    """Keep a text inside of its cell."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _interface(schema: Schema, profile: Profile) -> str:
    shape = ", ".join(["batch", *map(str, schema.input_shape)])
    lines = [f"`input`: {schema.served_dtype}, shape ({shape}). Columns as seen in training:", ""]
    rows = [
        f"| {_cell(column.name)} | {column.kind} | {column.low:g} | {column.high:g} "
        f"| {seen.mean:.4g} |"
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
        f"Minga {lineage.environment.minga}, {lineage.environment.machine}, "
        f"{lineage.environment.cpu}; all versions in `environment.txt`, "
        f"sha256 {lineage.environment.digest}",
    }
    return "\n".join(f"- {name}: {value}" for name, value in facts.items())
