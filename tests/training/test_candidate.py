"""From a Task's own words to the verdict on its model."""

import numpy as np
import pytest

from minga.training.candidate import assess
from minga.training.config import GateConfig
from minga.training.data import profile_of
from minga.training.evaluate import predict
from minga.training.loop import Learner, fit
from minga.training.network import build_network


@pytest.fixture
def trained(blobs, splits):
    """A network that has learned a little."""
    network = build_network(blobs, blobs.defaults, splits.train, seed=7)
    fit(Learner(blobs, network, blobs.defaults), splits.train, epochs=20, seed=7)
    return network


@pytest.fixture
def judge(trained, splits):
    """Judges that network by a Task; gives the report, and the gates of slices by name."""

    def run(task, **limits):
        report = assess(
            task,
            trained,
            splits.test,
            schema=task.schema(splits.train),
            profile=profile_of(task, splits.train),
            champion=None,
            config=GateConfig(**limits),
            seed=7,
        ).report
        return report, {gate.name: gate for gate in report.gates if "slice" in gate.name}

    return run


def test_slice_on_which_the_model_fails_refuses_it(blobs, splits, trained, judge):
    """What `Task.slices` names is measured on the test split and judged; an empty slice is not.

    A slice on which the model is always wrong refuses it, by that gate alone; where the limit
    allows it the same model passes.
    """
    wrong = (predict(trained, splits.test.inputs) > 0) != (splits.test.targets > 0.5)

    class Sliced(type(blobs)):
        def slices(self, split):
            return {"wrong": wrong, "right": ~wrong, "nobody": np.zeros(len(split), bool)}

    report, gates = judge(Sliced(), min_slice_examples=5)
    assert set(gates) == {"slice wrong", "slice right"}
    assert gates["slice right"].passed
    assert gates["slice wrong"].seen.startswith("accuracy 0.0000, overall ")
    assert [gate.name for gate in report.refused] == ["slice wrong"]
    report, gates = judge(Sliced(), min_slice_examples=5, max_slice_gap=1.0)
    assert gates["slice wrong"].passed
    assert report.blessed


def test_groups_are_slices_unless_the_task_says_otherwise(blobs, judge):
    """A Task that names groups has each judged as a slice; of a small one only the figure."""

    class Grouped(type(blobs)):
        def groups(self, split):
            return {"site": np.where(np.arange(len(split)) < 10, "new", "old")}

    _, gates = judge(Grouped())
    assert set(gates) == {"slice site=new", "slice site=old"}
    assert gates["slice site=new"].seen.endswith("10 examples are too few to judge")
