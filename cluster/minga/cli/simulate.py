"""`minga simulate`: a federation on virtual devices."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minga.cli.output import print_json, print_line, print_note, print_table, show_progress

if TYPE_CHECKING:
    from minga.cluster.simulate import Report

SHOWN_ROUNDS = 12
"""Rows of the table of rounds; with more rounds it shows some of them, the last always."""


def simulate(
    *,
    project: Path = Path(),
    params: Path | None = None,
    start: str = "",
    fresh: bool = False,
    json: bool = False,
) -> None:
    """Play a federation on virtual devices, before there are real ones.

    The `[federation]` table of minga.toml says how the campaign goes, exactly as for
    `minga federate`; `[simulation]` says how many devices there are, how the project's data is
    divided among them, how many vanish and how fast they are. Rounds, aggregation, rules, privacy
    and server optimisers are the coordinator's own; small networks are trained for many devices at
    once. Nothing is registered: what came out is in MLflow.

    Ctrl-C stops cleanly; the same command goes on from there.

    Example: minga simulate --project plant

    Args:
        project: The project folder.
        params: A JSON file with hyper-parameters, as for `minga train`; without it those of a
            finished search, else the Task's defaults.
        start: A registered version, or champion, to start from; without it untrained weights.
        fresh: Start anew even if an interrupted simulation is kept.
        json: Print JSON.
    """
    from minga.cluster.project import load

    loaded = load(project)
    from minga.cli.project import choose_params
    from minga.cluster.simulate import simulate as run

    chosen, origin = choose_params(loaded, params)
    if not start:
        print_note(f"parameters from {origin}")
    with show_progress() as show:
        report = run(loaded, chosen, show, start=start, fresh=fresh)
    if json:
        print_json(_described(report))
        return
    _show(report, loaded.loaded_task.objective.metric)


def _described(report: "Report") -> dict[str, Any]:
    simulated = report.simulated
    return {
        "run_id": report.run_id,
        "params": report.params,
        "devices": simulated.num_devices,
        "rounds": simulated.history,
        "metrics": report.metrics,
        "seconds": round(simulated.seconds, 3),
        "rounds_per_s": round(simulated.num_rounds / max(simulated.seconds, 1e-9), 2),
        "together": not simulated.one_by_one,
        "one_by_one_because": simulated.one_by_one,
        "workers": simulated.num_workers,
        "trained": simulated.way.value if simulated.way else "",
    }


def _show(report: "Report", metric: str) -> None:
    simulated = report.simulated
    history = simulated.history
    step = -(-len(history) // SHOWN_ROUNDS)
    shown = [r for r in history if int(r["epoch"]) % step == 0 or r is history[-1]]
    columns = [
        name
        for name in ("devices", "loss", metric, f"devices_{metric}", "epsilon", "simulated_s")
        if any(record.get(name) for record in shown)
    ]
    print_table(
        ("round", *columns),
        [
            (f"{record['epoch']:.0f}", *(_figure(name, record.get(name)) for name in columns))
            for record in shown
        ],
    )
    if simulated.one_by_one:
        print_note(f"devices were trained one by one: {simulated.one_by_one}")
    elif simulated.way is not None:
        where = "in this process"
        if simulated.num_workers > 1:
            where = f"in {simulated.num_workers} processes on Ray"
        print_note(f"devices were trained {simulated.way.value}; {where}")
    pace = simulated.num_rounds / max(simulated.seconds, 1e-9)
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in report.metrics.items())
    print_line(f"{simulated.num_devices} virtual devices, {pace:.1f} rounds/s; test: {metrics}")
    print_note("the run is in MLflow; for real devices: minga coordinator run, minga federate")


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if name in ("devices", "simulated_s") else f"{value:.4f}"
