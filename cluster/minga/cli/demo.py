"""`minga demo`: the whole loop on real data."""

from pathlib import Path
from typing import TYPE_CHECKING

from minga.cli.output import print_json, print_line, print_note, print_table, show_progress

if TYPE_CHECKING:
    from minga.cluster.demo_report import DemoReport


def demo(
    *,
    folder: Path | None = None,
    report: Path | None = None,
    sites: int = 8,
    rounds: int = 5,
    trials: int = 8,
    seed: int = 7,
    json: bool = False,
) -> None:
    """Run the whole loop on real sensor data: search, train, serve, federate, swap, devices.

    Takes about three minutes on two cores. Everything happens in a scratch folder and on loopback;
    what was made stays there for you to look at.

    Example: minga demo --report demo.json

    Args:
        folder: Where to work; must be empty or missing. The default is a new temporary folder.
        report: Write the results there as JSON.
        sites: How many devices take part, at least 5.
        rounds: How many rounds they train, at least 3.
        trials: How many sets of hyper-parameters the search tries.
        seed: Decides everything that is drawn.
        json: Print the results as JSON instead of tables.
    """
    import tempfile

    import orjson

    from minga.cluster.demo import Demo, DemoConfig

    work = folder or Path(tempfile.mkdtemp(prefix="minga-demo-"))
    config = DemoConfig(num_sites=sites, num_rounds=rounds, num_trials=trials, seed=seed)
    print_note(f"working in {work}")
    try:
        with show_progress() as on_progress:
            result = Demo(work, config, on_progress).run()
    except BaseException:
        print_note(f"the demo did not finish; what it made is in {work}, its logs in {work}/logs")
        raise
    if report is not None:
        report.write_bytes(orjson.dumps(result.as_json(), option=orjson.OPT_INDENT_2))
    if json:
        print_json(result.as_json())
    else:
        show(result, work)


def show(result: "DemoReport", work: Path) -> None:
    """Print the closing tables and what to open next."""
    names = sorted(result.metrics["federated"])
    print_table(
        ("central test set", *names),
        [
            (who, *(f"{metrics[name]:.4f}" for name in names))
            for who, metrics in result.metrics.items()
        ],
    )
    print_line("")
    rows = list(result.rows())
    width = max(len(what) for what, _ in rows)
    for what, figure in rows:
        print_line(f"{what:<{width}}  {figure}")
    print_line("")
    print_line(
        f"next: cd {work}/project && minga model list, or start your own with: minga init plant"
    )
