"""`minga federate`: train the champion further on the fleet."""

from pathlib import Path
from typing import TYPE_CHECKING

from minga.cli.output import print_json, print_line, print_note, print_table, show_progress

if TYPE_CHECKING:
    from minga.federation.v1 import federation_pb2 as pb


def federate(
    *,
    project: Path = Path(),
    state: Path = Path("coordinator"),
    campaign: str = "",
    json: bool = False,
) -> None:
    """Train the champion further on devices, judge the result, promote and publish it if it passes.

    The `[federation]` table of minga.toml says how many rounds over how many devices. Only sums of
    updates leave the coordinator's secure aggregation; data never leaves a device. Ctrl-C leaves
    the campaign running at the coordinator and says its name; with --campaign it is taken up again.

    Example: minga federate --project plant --state coordinator

    Args:
        project: The project folder.
        state: The coordinator's state folder, or an operator's identity folder.
        campaign: Follow this campaign, started earlier, and finish what it is for.
        json: Print JSON.
    """
    from minga.cluster.federate import federate as run
    from minga.cluster.fleet import describe_campaign, privacy_note, report_campaign
    from minga.cluster.project import load

    loaded = load(project)
    seen: list[pb.Campaign] = []
    try:
        with show_progress() as show:
            watch = report_campaign(show)

            def on_campaign(newest: "pb.Campaign") -> None:
                seen[:] = [newest]
                watch(newest)

            result = run(
                loaded, state, on_campaign=on_campaign, on_progress=show, campaign_id=campaign
            )
    except KeyboardInterrupt:
        if seen:
            print_note(
                f"campaign {seen[0].campaign_id} goes on at the coordinator; finish it with: "
                f"minga federate --campaign {seen[0].campaign_id}; or stop it with: "
                f"minga coordinator cancel {seen[0].campaign_id}"
            )
        raise
    described = describe_campaign(result.campaign)
    report = {
        "campaign": described,
        "model": result.registered.name,
        "version": result.registered.version,
        "promoted": result.promoted,
        "metrics": dict(result.registered.report.metrics),
        "devices_told": result.num_devices_told,
    }
    if json:
        print_json(report)
        return
    metrics = result.registered.report.metrics
    print_table(
        ("metric", "test split"), [(name, f"{value:.4f}") for name, value in metrics.items()]
    )
    for round_ in result.evaluations:
        print_table(
            ("metric", f"on devices, after round {round_.number}"),
            [(name, f"{value:.4f}") for name, value in sorted(round_.metrics.items())],
        )
    if result.campaign.plan.HasField("privacy"):
        print_line(f"privacy: {privacy_note(described['privacy'])}")
    registered = result.registered
    refused = "passed its gates" if registered.report.blessed else "refused by its gates"
    verdict = "promoted to champion" if result.promoted else refused
    print_line(f"{registered.name} version {registered.version}: {verdict}")
    if registered.report.blessed and not result.promoted:
        from minga.cli.project import waiting_note

        print_note(waiting_note(registered.version))
