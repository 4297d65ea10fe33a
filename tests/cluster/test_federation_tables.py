"""The tables inside [federation]: what they become in a campaign's plan."""

import pytest

from minga.cluster.errors import ProjectError
from minga.cluster.project import load
from minga.federation import wire
from minga.federation.condition import Requirements
from minga.federation.limits import MIB
from minga.federation.planning import campaign_plan
from minga.federation.work import Evaluation, Method

SOUND = 'task = "task.py:T"\n[data]\nsource = "data/a.csv"\n'


@pytest.fixture
def plan_of(tmp_path):
    """Reads a minga.toml of the given text and writes its campaign's plan."""

    def read(text):
        (tmp_path / "minga.toml").write_text(SOUND + text)
        config = load(tmp_path).federation
        return campaign_plan(
            config,
            model_name="m",
            parent_version="1",
            training={"lr": 0.1},
            metrics=("loss", "accuracy"),
        )

    return read


def test_requirements(plan_of):
    """What is asked of devices goes into the plan, memory in bytes; without a table nothing is."""
    table = "[federation.requirements]\ncharging = true\nmin_free_memory_mb = 3\nmin_examples = 9\n"
    assert wire.requirements_from_wire(plan_of(table)) == Requirements(
        charging=True, min_free_memory_bytes=3 * MIB, min_examples=9
    )
    assert wire.requirements_from_wire(plan_of("")) == Requirements()


def test_evaluation(plan_of):
    """Devices measure what the table names, or the loss and the objective; unasked nothing."""
    assert wire.evaluation_of(plan_of("")) is None
    plan = plan_of("[federation.evaluation]\nenabled = true\nevery = 2\n")
    assert wire.evaluation_of(plan) == Evaluation(metrics=("accuracy", "loss"), clip=100.0)
    assert plan.evaluate_every == 2
    plan = plan_of('[federation.evaluation]\nenabled = true\nmetrics = ["mae"]\nclip = 5\n')
    assert wire.evaluation_of(plan) == Evaluation(metrics=("mae",), clip=5.0)


def test_ways_to_learn(plan_of):
    """Personal patterns, control variates and a buffer go into the plan as they are written."""
    method = wire.method_of(plan_of('[federation]\npersonal = ["head.*"]\nscaffold = true\n'))
    assert method == Method(personal=("head.*",), scaffold=True)
    plan = plan_of('[federation]\nprotection = "plain"\n[federation.buffer]\nsize = 4\n')
    assert (plan.buffer.size, plan.buffer.max_staleness) == (4, 4)
    assert not plan_of("").HasField("buffer")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[federation.requirements]\nmin_examples = -1\n", "min_examples"),
        ("[federation.evaluation]\nevery = -1\n", "every"),
        ("[federation.evaluation]\nclip = 0\n", "clip"),
        ('[federation]\npersonal = [""]\n', "patterns of 1 to"),
        ("[federation.buffer]\nsize = 4\n", "masks cancel only"),
    ],
)
def test_mistakes_are_told(plan_of, table, message):
    """A wrong number is refused by its path."""
    with pytest.raises(ProjectError, match=message):
        plan_of(table)
