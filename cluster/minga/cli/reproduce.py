"""`minga reproduce`: train a run again and compare, bit by bit."""

from pathlib import Path

from minga.cli.output import print_json, print_line, print_table, show_progress


def reproduce(
    run: str,
    *,
    project: Path = Path(),
    name: str = "",
    tolerance: float | None = None,
    json: bool = False,
) -> None:
    """Train a run again from its code, data, settings and seed, and compare the weights.

    The recorded commit is checked out into a folder of its own; yours stays as it is. On the same
    kind of machine the weights are equal bit by bit, with one worker and with several. Where they
    are not, the metrics are compared and the first thing that differs is named, and the command
    ends with exit code 48.

    Example: minga reproduce champion

    Example: minga reproduce 3 --tolerance 0.005

    Args:
        run: An MLflow run, or the number or alias of a version.
        project: The project folder.
        name: The model, if the registry has several.
        tolerance: Be content if no test metric differs by more, for instance on another processor.
        json: Print JSON.
    """
    from minga.cluster.errors import ReproductionError
    from minga.cluster.project import load
    from minga.cluster.reproduction import reproduce as train_again

    loaded = load(project)
    version = loaded.registry().find_run(name or loaded.loaded_task.name, run)
    with show_progress() as show:
        found = train_again(loaded, version, show)
    if json:
        print_json(found)
    else:
        print_line(f"{found.model} version {found.version}, run {found.run_id}")
        for one in found.conditions:
            print_line(f"  not as it was: {one}")
        rows = [(n, f"{was:.6f}", f"{now:.6f}") for n, (was, now) in found.metrics.items()]
        print_table(("test metric", "recorded", "now"), rows)
        if found.is_equal:
            print_line(f"the weights are equal, bit by bit: sha256 {found.now_sha256}")
        else:
            print_line(f"the weights differ; first in {found.first_difference}")
    if not found.is_equal and (tolerance is None or found.largest_gap > tolerance):
        raise ReproductionError(
            f"training run {found.run_id} again gave other weights; first difference: "
            f"{found.first_difference}; largest gap of a test metric {found.largest_gap:.6f}"
        )
