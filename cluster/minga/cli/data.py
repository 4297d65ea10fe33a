"""`minga data`: look at data, and check it, before anything is trained on it."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from minga.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from minga.training.data import DataReport, Violation
    from minga.training.data.measures import Measures
    from minga.training.selection.features import FeatureReport

app = App(name="data", help="Describe data, check it against its schema, report on it.")


@app.command
def check(
    *,
    project: Path = Path(),
    source: str | None = None,
    report: Path | None = None,
    json: bool = False,
) -> None:
    """Check data against the kept schema and the champion's profile.

    Without a schema.json in the project the champion's schema counts, and before there is a
    champion the data's own training split. Errors end with exit code 44; so do warnings if
    `[data] strict` is set.

    Example: minga data check --source data/new.csv

    Args:
        project: The project folder.
        source: Other data than the project's; a relative path is taken from the project folder.
        report: Write what is wrong to this file, as JSON.
        json: Print JSON.
    """
    from minga.cluster.project import load

    loaded = load(project)  # before what takes seconds to import: a mistake is answered at once
    from minga.cluster.checking import check_data

    found = check_data(loaded, source)
    if report is not None:
        _write_violations(report, found)
    if json:
        print_json(found)
    else:
        _show(found)
    found.require_valid()


@app.command
def schema(
    *,
    project: Path = Path(),
    replace: bool = False,
    tfdv: Path | None = None,
    json: bool = False,
) -> None:
    """Infer the schema of the training data and keep it in the project, as schema.json.

    From then on all data is checked against it, on devices too: commit it, and edit it where you
    know better than the data.

    Example: minga data schema --tfdv schema.pbtxt

    Args:
        project: The project folder.
        replace: Take the data's schema where another one is kept.
        tfdv: Write the schema for TensorFlow Data Validation too, to this file.
        json: Print JSON.
    """
    from minga.cluster.project import load

    loaded = load(project)
    from minga.cluster.checking import keep_schema

    kept, changes = keep_schema(loaded, replace=replace)
    if tfdv is not None:
        from minga.training.data.tfdv import to_tfdv

        tfdv.write_text(to_tfdv(kept, loaded.data), encoding="utf-8")
    if json:
        print_json(kept)
        return
    for change in changes:
        print_line(change)
    print_table(
        ("column", "kind", "low", "high", "categories", "missing"),
        [
            (
                column.name,
                "identifier" if column.unique else column.kind,
                f"{column.low:g}",
                f"{column.high:g}",
                ", ".join(column.named(value) for value in column.categories),
                f"{column.missing:.2%}",
            )
            for column in kept.columns
        ],
    )
    print_line(f"kept in {loaded.schema_file}")


@app.command
def report(
    *,
    project: Path = Path(),
    out: Path = Path("data-report.html"),
    noise: bool = True,
    features: bool = False,
    json: bool = False,
) -> None:
    """Write a page about the data: what is wrong, what its columns tell, labels that look wrong.

    The page is one HTML file with its pictures inside. Labels are suspect where a model that did
    not learn from an example is sure of another one; finding them takes seconds.

    Example: minga data report --project plant --out plant.html

    Args:
        project: The project folder.
        out: The file to write.
        noise: Look for labels that are suspect; --no-noise leaves it out.
        features: Propose columns too, as `minga data features` does.
        json: Print the measures as JSON too.
    """
    from minga.cluster.project import load

    loaded = load(project)
    from minga.cluster.checking import check_data
    from minga.training.data.measures import measure_split
    from minga.training.data.reading import SPLIT_NAMES, sample_of_split
    from minga.training.data.report import render
    from minga.training.task import Splits

    found = check_data(loaded)
    names = loaded.loaded_task.columns
    parts = {name: sample_of_split(loaded.splits[name]) for name in SPLIT_NAMES}
    splits = Splits(**parts)
    measures = measure_split(splits.train, names, seed=loaded.seed, look_for_noise=noise)
    proposal = None
    if features:
        from minga.training.selection.features import propose_features

        proposal = propose_features(loaded.loaded_task, loaded.splits.train, seed=loaded.seed)
    out.write_text(render(found, measures, splits, proposal), encoding="utf-8")
    if json:
        proposed = {"features": proposal} if proposal else {}
        print_json({"check": found, "measures": measures, **proposed})
        return
    _show_measures(measures)
    print_line(f"written to {out}")


@app.command
def features(*, project: Path = Path(), json: bool = False) -> None:
    """Propose the columns that models should go by, for [data] features of minga.toml.

    A column is useful if held-out examples miss it more than they miss columns of noise, in most
    folds of a cross-validation over the training split. That the proposed columns are as good as
    all is checked. Models still take whole rows; what is not chosen is put out of their sight.

    Example: minga data features --project plant

    Args:
        project: The project folder.
        json: Print JSON.
    """
    from minga.cluster.project import load

    loaded = load(project)
    from minga.cli.output import show_progress
    from minga.cluster.checking import require_valid_data
    from minga.training.selection.features import propose_features

    require_valid_data(loaded)
    with show_progress() as show:
        found = propose_features(
            loaded.loaded_task, loaded.splits.train, seed=loaded.seed, on_progress=show
        )
    if json:
        print_json(found.model_dump() | {"proposed": found.proposed})
        return
    _show_features(found)


def _show_features(found: "FeatureReport") -> None:
    print_table(
        ("column", "worth", "useful", "tells of the target", "proposed"),
        [
            (
                one.name,
                f"{one.worth:+.4f}",
                f"{one.num_useful} of {found.num_folds} folds",
                f"{one.information_bits:.3f} bits",
                ("yes" if one.proposed else "no") + (f", {one.note}" if one.note else ""),
            )
            for one in found.features
        ],
    )
    print_line(
        f"{found.metric} with all columns {found.with_all:.4f}, with the proposed "
        f"{len(found.proposed)} {found.with_proposed:.4f} (standard error {found.error:.4f})"
    )
    names = ", ".join(f'"{name}"' for name in found.proposed)
    print_line(f"[data]\nfeatures = [{names}]")


def _show_measures(measures: "Measures") -> None:
    print_table(
        ("column", "entropy", "tells of the target", "most frequent", "missing"),
        [
            (
                item.name,
                f"{item.entropy_bits:.2f} bits",
                f"{item.share_of_target:.1%}",
                f"{item.top_share:.1%}",
                f"{item.missing:.2%}",
            )
            for item in sorted(measures.columns, key=lambda item: -item.information_bits)
        ],
    )
    for name in measures.near_constant:
        print_line(f"{name} is near-constant")
    for first, second in measures.duplicates:
        print_line(f"{second} follows from {first}")
    print_line(f"{len(measures.suspected_labels)} labels are suspect; {measures.noise_note}")


def _write_violations(file: Path, found: "DataReport") -> None:
    import orjson

    content = {
        "source": found.source,
        "digest": found.digest,
        "reference": found.reference,
        "violations": [violation.model_dump() for violation in found.violations],
    }
    file.write_bytes(orjson.dumps(content, option=orjson.OPT_INDENT_2) + b"\n")


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
        _show_violations(report.violations)
    counts = ", ".join(f"{count} {name}" for name, count in report.num_examples.items())
    num_warnings = len(report.violations) - len(report.errors)
    print_line(
        f"{counts}; checked against {report.reference}: "
        f"{len(report.errors)} errors, {num_warnings} warnings; sha256 {report.digest[:12]}"
    )
    for version in report.versions:
        if version.sha256:
            tracked = f", DVC {version.dvc.md5}" if version.dvc else ""
            print_line(f"{version.source}: sha256 {version.sha256}{tracked}")


def _show_violations(violations: "Sequence[Violation]") -> None:
    print_table(
        ("severity", "path", "what", "expected", "seen", "count"),
        [
            (found.severity, found.path, found.kind, found.expected, found.seen, str(found.count))
            for found in violations
        ],
    )
