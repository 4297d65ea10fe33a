"""`minga data`: check data before anything is trained on it."""

from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from minga.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from minga.training.data import DataReport

app = App(name="data", help="Check data against its schema.")


@app.command
def check(*, project: Path = Path(), source: str | None = None, json: bool = False) -> None:
    """Check data against the champion's schema and profile, or its own before there is a champion.

    Example: minga data check --source data/new.csv

    Args:
        project: The project folder.
        source: Other data than the project's; a relative path is taken from the project folder.
        json: Print JSON.
    """
    from minga.cluster.project import load

    loaded = load(project)  # before what takes seconds to import: a mistake is answered at once
    from minga.cluster.pipeline import check_data

    report = check_data(loaded, source)
    if json:
        print_json(report)
    else:
        _show(report)
    report.require_valid()


def _show(report: "DataReport") -> None:
    print_table(
        ("column", "kind", "low", "high", "mean", "missing"),
        [
            (
                column.name,
                column.kind,
                f"{column.low:g}",
                f"{column.high:g}",
                f"{seen.mean:.4g}",
                f"{column.missing:.2%}",
            )
            for column, seen in zip(report.data_schema.columns, report.profile.inputs, strict=True)
        ],
    )
    if report.violations:
        print_table(
            ("severity", "where", "what", "seen", "should be"),
            [
                (
                    found.severity,
                    f"{found.split}.{found.column}".rstrip("."),
                    found.kind,
                    found.seen,
                    found.goal,
                )
                for found in report.violations
            ],
        )
    counts = ", ".join(f"{count} {name}" for name, count in report.num_examples.items())
    num_warnings = len(report.violations) - len(report.errors)
    print_line(
        f"{counts}; checked against {report.reference}: "
        f"{len(report.errors)} errors, {num_warnings} warnings; sha256 {report.digest[:12]}"
    )
