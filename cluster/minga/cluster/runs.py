"""The runs of what was trained elsewhere: campaigns on devices, and versions judged anew.

A campaign's rounds are in its run while it goes on, named as those of `minga simulate`, so that it
can be laid beside what was simulated of it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from minga.cluster.fleet import OnCampaign, committed
from minga.cluster.project import Project
from minga.federation.v1 import federation_pb2 as pb
from minga.training.history import Record
from minga.training.lineage import Lineage, digest_of_settings
from minga.training.progress import OnProgress, silent


@contextmanager
def campaign_run(
    project: Project, campaign_id: str, on_progress: OnProgress = silent
) -> Iterator[tuple[str, OnCampaign]]:
    """Keep a campaign's run for as long as it is followed; who follows it again goes on with it.

    Args:
        project: whose campaign it is.
        campaign_id: which one.
        on_progress: hears of the seconds that making a database takes.

    Yields:
        the run's id, and what to tell of the campaign at each change.
    """
    from minga.training.recording import recording  # noqa: PLC0415 - loads MLflow

    tracker = project.tracker(on_progress)
    name = hashlib.sha256(campaign_id.encode()).hexdigest()[:16]
    tags = {"minga.step": "federate", "minga.campaign": campaign_id}
    with (
        tracker.run("federate", tags=tags, kept=project.ray_storage / f"{name}.run") as run_id,
        recording(tracker, project.tensorboard_folder) as recorder,
    ):
        tracker.log_settings(run_id, project.model_dump(mode="json"))
        recorder.open(run_id, f"federate-{run_id[:8]}")

        def note(campaign: pb.Campaign) -> None:
            for record in records_of(campaign):
                recorder.note(run_id, record)

        yield run_id, note


def records_of(campaign: pb.Campaign) -> list[Record]:
    """Give what is known of each committed round, and what devices measured after it."""
    records: list[Record] = []
    for round_ in committed(campaign):
        record: Record = {
            "epoch": round_.number,
            "devices": len(round_.survivors),
            "examples": round_.total_weight,
            "bytes_received": round_.bytes_received,
            "bytes_sent": round_.bytes_sent,
        }
        if round_.HasField("privacy"):
            record["epsilon"] = round_.privacy.epsilon
        records.append(record)
    evaluations = committed(campaign, pb.ROUND_WORK_EVALUATION)
    return records + [_measured(round_.number, round_.metrics) for round_ in evaluations]


def open_run(project: Project, lineage: Lineage, on_progress: OnProgress = silent) -> str:
    """Make the run of parameters that came from elsewhere, and give its id."""
    evaluations = lineage.campaign.evaluations if lineage.campaign else {}
    history = [_measured(number, metrics) for number, metrics in sorted(evaluations.items())]
    tracker = project.tracker(on_progress)
    with tracker.run(lineage.origin, tags={"minga.step": "register"}) as run_id:
        tracker.log(run_id, params=lineage.params, history=history)
        tracker.log_settings(run_id, project.model_dump(mode="json"))
    return run_id


def settings_of(project: Project, run_id: str) -> str:
    """Name the settings that a run keeps, so that the verdict vouches for them too."""
    return digest_of_settings(project.tracker().read_settings(run_id)) if run_id else ""


def _measured(number: int, metrics: Mapping[str, float]) -> Record:
    """Name what devices measured after a round."""
    return {"epoch": number, **{f"devices_{name}": value for name, value in metrics.items()}}
