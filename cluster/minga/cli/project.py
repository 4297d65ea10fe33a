"""`minga init`, `run`, `tune`, `train`: a project from nothing to a registered model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from minga.cli.output import (
    print_gates,
    print_json,
    print_line,
    print_note,
    print_table,
    show_progress,
)

if TYPE_CHECKING:
    from minga.cluster.pipeline import Registered
    from minga.cluster.project import Project
    from minga.training.selection.comparison import Selection
    from minga.training.space import Params
    from minga.training.trials import SearchResult


From = Annotated[str, Parameter(name="--from")]


def init(directory: Path, *, sites: int = 0) -> None:
    """Write a runnable example project: find anomalies in real sensor readings.

    Example: minga init plant

    Args:
        directory: The folder to write; it must be new or empty.
        sites: Write the data of so many sites as well, for a federation.
    """
    from minga.cluster.template import write

    files = write(directory, num_sites=sites)
    print_line(f"{len(files)} files written to {directory}; next: cd {directory} && minga run")


def run(
    *,
    project: Path = Path(),
    auto: bool = False,
    fresh: bool = False,
    from_: From = "",
    json: bool = False,
) -> None:
    """Check data, search, train, judge, register; promote to champion if all gates pass.

    Ctrl-C stops cleanly; the same command goes on from there. A finished search is kept, and used
    again as long as code, data and settings stay as they are; so is a finished comparison.

    Example: minga run --project plant

    Example: minga run --auto

    Example: minga run --from champion

    Args:
        project: The project folder.
        auto: Compare kinds of models first, by cross-validation: the Task's own, a linear one, a
            plain network, boosted trees, and what else the Task names. The simplest that is as
            good as the best is trained. How is said by [selection] of minga.toml.
        fresh: Search and compare anew even if a result is kept.
        from_: A version's number or alias: train its weights further, on the data of now and with
            its hyper-parameters, in place of a search.
        json: Print JSON.
    """
    loaded = _load(project)
    from minga.cluster.errors import ProjectError

    if from_ and (auto or fresh):
        raise ProjectError(
            "--from goes on with what a version is, so there is nothing to search or to compare; "
            "leave --auto and --fresh out"
        )
    from minga.cluster.pipeline import parent_of
    from minga.cluster.pipeline import run as run_pipeline
    from minga.training.errors import GateError

    parent = parent_of(loaded, from_) if from_ else None
    with show_progress() as show:
        report = run_pipeline(loaded, show, fresh_search=fresh, auto=auto, parent=parent)
    if json:
        data = report.data.model_dump(include={"source", "digest", "num_examples", "violations"})
        print_json(
            _registered(report.registered)
            | {"promoted": report.promoted, "params": report.trained.params, "data": data}
            | {"selection": report.selection}
            | {"trials": _trials(report.search), "seconds": dict(report.seconds)}
        )
    else:
        if report.selection is not None:
            _show_selection(report.selection)
        print_gates(report.registered.report)
        standing = "challenger" if report.registered.report.blessed else "candidate"
        _show_registered(report.registered, "champion" if report.promoted else standing)
        if standing == "challenger" and not report.promoted:
            print_note(waiting_note(report.registered.version))
        if report.promoted:
            print_note("next: minga serve, then minga predict; or minga model show champion")
    if not report.registered.report.blessed:
        raise GateError(_refusal(report.registered))


def tune(*, project: Path = Path(), fresh: bool = False, json: bool = False) -> None:
    """Search hyper-parameters with Ray Tune; `minga train` then uses the best.

    Ctrl-C stops cleanly; the same command goes on from there.

    Example: minga tune --project plant --json

    Args:
        project: The project folder.
        fresh: Search anew even if a search is kept.
        json: Print JSON.
    """
    loaded = _load(project)
    from minga.cluster.learning import picture_of, search

    with show_progress() as show:
        found = search(loaded, show, fresh=fresh)
    if json:
        print_json({"params": found.params, "metrics": found.metrics, "trials": _trials(found)})
        return
    metrics = sorted({name for trial in found.trials for name in trial.metrics})
    print_table(
        ("trial", "status", "epochs", *metrics, "parameters"),
        [
            (
                str(trial.number),
                trial.status,
                str(trial.epochs),
                *(_figure(trial.metrics.get(name)) for name in metrics),
                _words(trial.params),
            )
            for trial in found.trials
        ],
        empty="there is nothing to search; the Task's defaults are used",
    )
    print_line(f"best: {_words(found.params)}")
    if found.trials:
        print_note(f"picture: {picture_of(loaded)}")


def train(
    *,
    project: Path = Path(),
    params: Path | None = None,
    from_: From = "",
    json: bool = False,
) -> None:
    """Train once, judge, and register a candidate; promote it with `minga model promote`.

    Parameters come from --params, else from a finished search of the same code, data and settings,
    else from the Task's defaults.

    Example: minga train --project plant

    Args:
        project: The project folder.
        params: A JSON file with hyper-parameters; what it leaves out is taken from the defaults,
            or from the version that --from names.
        from_: A version's number or alias: train its weights further, on the data of now.
        json: Print JSON.
    """
    loaded = _load(project)
    from minga.cluster.pipeline import parent_of, register_trained
    from minga.cluster.pipeline import train as train_once

    parent = parent_of(loaded, from_) if from_ else None
    if parent is None:
        chosen, origin = choose_params(loaded, params)
    else:
        chosen = {**parent.params, **(_read_params(params) if params else {})}
        origin = f"version {parent.version}"
    print_note(f"parameters from {origin}: {_words(chosen)}")
    with show_progress() as show:
        trained = train_once(loaded, chosen, show, parent=parent)
        registered = register_trained(loaded, trained, show)
    if json:
        print_json(_registered(registered) | {"params": dict(chosen)})
        return
    print_gates(registered.report)
    _show_registered(registered, "challenger" if registered.report.blessed else "candidate")
    if registered.report.blessed:
        print_note(f"next: minga model promote {registered.version}")


def _load(project: Path) -> "Project":
    """Read the settings before what takes seconds to import: a mistake is answered at once."""
    from minga.cluster.project import load

    return load(project)


def choose_params(project: "Project", file: Path | None) -> "tuple[Params, str]":
    """Give hyper-parameters and where they come from."""
    from minga.cluster.pipeline import finished_search

    defaults = project.loaded_task.defaults
    if file is not None:
        return {**defaults, **_read_params(file)}, str(file)
    found = finished_search(project)
    if found is not None:
        return found.params, "the finished search"
    return dict(defaults), "the Task's defaults"


def _read_params(file: Path) -> "Params":
    import orjson

    from minga.cluster.errors import ProjectError

    try:
        values = orjson.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ProjectError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ProjectError(f'{file} holds {values!r}; write an object, such as {{"lr": 0.01}}')
    # What `minga tune --json` prints is taken as it is.
    chosen = values.get("params", values)
    assert isinstance(chosen, dict)
    return chosen


def _registered(registered: "Registered") -> dict[str, Any]:
    return {
        "model": registered.name,
        "version": registered.version,
        "run_id": registered.run_id,
        "bundle": registered.bundle_path,
        **registered.report.model_dump(),
    }


def _trials(found: "SearchResult") -> list[dict[str, Any]]:
    return [trial.model_dump(exclude={"history"}) for trial in found.trials]


def _show_registered(registered: "Registered", standing: str) -> None:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in registered.metrics.items())
    print_line(f"{registered.name} version {registered.version} is {standing}: {metrics}")


def _show_selection(selection: "Selection") -> None:
    share = f"{selection.confidence:.0%}"
    print_table(
        ("model", selection.metric, share, "behind best", share, "p", "size", "fit", "federates"),
        [
            (
                one.name + (" *" if one.name == selection.chosen else ""),
                f"{one.mean:.4f}",
                f"{one.low:.4f} .. {one.high:.4f}",
                "-" if one.name == selection.best else f"{one.behind:.4f}",
                "-"
                if one.name == selection.best
                else f"{one.behind_low:.4f} .. {one.behind_high:.4f}",
                "-" if one.name == selection.best else f"{one.p_value:.3f}",
                f"{one.size_bytes / 1e3:.0f} kB",
                f"{one.seconds:.1f} s",
                "yes" if one.can_federate else "no",
            )
            for one in selection.standings
        ],
    )
    for failure in selection.failures:
        print_note(f"{failure.name} does not count: {failure.reason}")
    print_line(f"chosen: {selection.chosen}; {selection.why}")
    if not selection.of(selection.chosen).can_federate:
        print_note(
            f"{selection.chosen} is no network: it is served and sent to devices, but no fleet can "
            "train it further"
        )


def waiting_note(version: int) -> str:
    """Say what a version that passed its gates waits for."""
    return (
        f"it waits for the approval of others: minga model approve {version}, then "
        f"minga model promote {version}"
    )


def _refusal(registered: "Registered") -> str:
    refused = ", ".join(gate.name for gate in registered.report.refused)
    return (
        f"version {registered.version} is registered but not promoted; refused by: {refused}; "
        f"see it with: minga model show {registered.version}"
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _words(params: "Params") -> str:
    parts = (
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in sorted(params.items())
    )
    return ", ".join(parts)
