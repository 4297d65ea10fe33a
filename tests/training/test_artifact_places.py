"""Where a new experiment keeps its files."""

from pathlib import Path

import pytest

from minga.training.tracking import Tracker


@pytest.mark.parametrize("root", ["mlflow-artifacts:/minga", "s3://models/minga"])
def test_a_uri_is_taken_as_it_is(root: str, tracking_uri: str) -> None:
    """What has a scheme is a store's, not a folder of this machine."""
    tracker = Tracker.open(tracking_uri, root, "thermometer")
    experiment = tracker.client.get_experiment(tracker.experiment_id)
    assert experiment.artifact_location == root


def test_a_folder_becomes_a_uri(tracking_uri: str, tmp_path: Path) -> None:
    """Each experiment has a folder of its own in it, the same for every process."""
    tracker = Tracker.open(tracking_uri, str(tmp_path / "files"), "scale")
    experiment = tracker.client.get_experiment(tracker.experiment_id)
    assert experiment.artifact_location == (tmp_path / "files" / "scale").as_uri()
