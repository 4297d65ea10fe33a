"""What is seen of a training while it goes on."""

import shutil
from pathlib import Path

import pytest

from minga.cluster.learning import train_model
from minga.cluster.project import load
from tests.events import points_of

pytestmark = pytest.mark.slow

TASKS = Path(__file__).parents[1] / "training" / "tasks"
TABLES = """
task = "blobs.py:Saves"
[data]
source = "1"
[training]
num_workers = 1
epochs = 20
keep_checkpoints = 1
"""


@pytest.fixture
def project(tmp_path, with_database):
    """A project whose epochs take a fifth of a second each."""
    (tmp_path / "minga.toml").write_text(TABLES)
    shutil.copy(TASKS / "blobs.py", tmp_path)
    return load(with_database(tmp_path))


def test_training_is_seen_while_it_goes_on(project, ray_cluster, tmp_path, monkeypatch):
    """Epochs are in MLflow and TensorBoard before the last is made; few checkpoints are kept.

    The best one stays beside the last; Ray deletes the others in its own time.
    """
    from minga.training import train

    monkeypatch.setattr(train, "CHECKPOINT_SHARE", train.CHECKPOINT_SHARE)  # the Task sets it
    drawn, logged, kept, ever = [], [], [], set()
    client = project.tracker().client

    def look(progress):
        drawn.append(len(points_of(project.tensorboard_folder, "train_loss")))
        (run,) = client.search_runs([project.tracker().experiment_id])
        logged.append(len(client.get_metric_history(run.info.run_id, "train_loss")))
        names = {path.name for path in project.ray_storage.glob("train-*/checkpoint_*")}
        kept.append(len(names))
        ever.update(names)

    params = {**project.loaded_task.defaults, "marker": str(tmp_path / "marker")}
    train_model(project, params, look)
    assert 0 < drawn[-2] < 20
    assert 0 < logged[-2] < 20
    assert max(kept) <= 5 < len(ever), (kept, ever)
    assert len(points_of(project.tensorboard_folder, "train_loss")) == 20
