"""The [federation.rule] table: what it becomes, and how mistakes in it are told."""

import pytest

from minga.cluster.errors import ProjectError
from minga.cluster.project import load
from minga.federation.aggregation.rules import (
    Clip,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    MultiKrum,
    TrimmedMean,
)
from minga.federation.planning import campaign_plan
from minga.federation.wire import rule_from_wire

SOUND = 'task = "task.py:T"\n[data]\nsource = "data/a.csv"\n'
PLAIN = SOUND + '[federation]\nprotection = "plain"\ncohort = 12\nmin_cohort = 10\n'
TABLE = PLAIN + "[federation.rule]\n"
GROUPS = "[federation]\ngroups = 4\ncohort = 16\nmin_cohort = 12\n"


@pytest.fixture
def plan_of(tmp_path):
    """Reads a minga.toml of the given text and writes its campaign's plan."""

    def read(text):
        (tmp_path / "minga.toml").write_text(text)
        config = load(tmp_path).federation
        return campaign_plan(config, model_name="m", parent_version="1", training={})

    return read


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (SOUND, Mean()),
        (TABLE + 'name = "mean"\nclip = 2\n', Mean(clip=Clip(max_norm=2.0))),
        (TABLE + 'name = "median"\nclip = "median"\n', Median(clip=Clip())),
        (TABLE + 'name = "trimmed_mean"\n', TrimmedMean(liar_share=0.2)),
        (TABLE + 'name = "krum"\nliar_share = 0.3\n', Krum(liar_share=0.3)),
        (TABLE + 'name = "multi_krum"\n', MultiKrum(liar_share=0.2)),
        (TABLE + 'name = "geometric_median"\n', GeometricMedian()),
        (SOUND + GROUPS + '[federation.rule]\nname = "median"\n', Median()),
    ],
    ids=["no table", "mean", "median", "trimmed", "krum", "multi_krum", "geometric", "groups"],
)
def test_table_becomes_the_plans_rule(plan_of, text, rule):
    """The coordinator gets the rule that the table names, with the numbers it has."""
    assert rule_from_wire(plan_of(text)) == rule


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TABLE + "clip = 1\n", r"federation\.rule\.name is missing; add one of mean, median"),
        (TABLE + 'name = "krumm"\n', r"name should be one of mean, .*, not 'krumm'"),
        (TABLE + 'name = "krum"\nliar_share = 0.5\n', r"liar_share should be less than 0\.5"),
        (TABLE + 'name = "median"\nliar_share = 0.2\n', r"unknown key federation\.rule\.liar_s"),
        (TABLE + 'name = "mean"\nclip = "mean"\n', r"federation\.rule\.clip"),
        (SOUND + '[federation.rule]\nname = "median"\n', r"1 sound contributions are too few"),
        (
            SOUND + GROUPS + '[federation.rule]\nname = "krum"\n',
            r"4 sound contributions are too few for Krum; it needs 5",
        ),
    ],
    ids=["no name", "no such", "range", "another's", "clip", "one sum", "few groups"],
)
def test_mistake_in_the_table_is_explained(plan_of, text, words):
    """A mistake is told by the path that it has in the file, with what to do."""
    with pytest.raises(ProjectError, match=words):
        plan_of(text)
