"""The [federation.privacy] table: what it becomes, what is told of it, and mistakes in it."""

import pytest

from minga.cluster.errors import ProjectError
from minga.cluster.fleet import describe_campaign, privacy_note, report_campaign
from minga.cluster.project import load
from minga.federation.aggregation.adaptive_clip import AdaptiveClip
from minga.federation.aggregation.ledger import Budget
from minga.federation.aggregation.privacy import Privacy
from minga.federation.planning import campaign_plan
from minga.federation.v1 import federation_pb2 as pb
from minga.federation.wire import privacy_from_wire

SOUND = 'task = "task.py:T"\n[data]\nsource = "data/a.csv"\n'
NUMBERS = "epsilon = 8\ndelta = 1e-5\nnoise_multiplier = 4\nmax_norm = 0.5\n"
CENTRAL = SOUND + '[federation.privacy]\nname = "central"\n' + NUMBERS
DISTRIBUTED = CENTRAL.replace("central", "distributed")
PLAIN = '[federation]\nprotection = "plain"\n[fed'


def asked(is_distributed):
    """Give what the numbers ask for."""
    return Privacy(
        budget=Budget(epsilon=8.0, delta=1e-5),
        noise_multiplier=4.0,
        max_norm=0.5,
        is_distributed=is_distributed,
    )


@pytest.fixture
def plan_of(tmp_path):
    """Reads a minga.toml of the given text and writes its campaign's plan."""

    def read(text):
        (tmp_path / "minga.toml").write_text(text)
        config = load(tmp_path).federation
        return campaign_plan(config, model_name="m", parent_version="1", training={})

    return read


@pytest.mark.parametrize(
    ("text", "privacy"),
    [
        (SOUND, None),
        (SOUND + '[federation.privacy]\nname = "none"\n', None),
        (CENTRAL, asked(is_distributed=False)),
        (DISTRIBUTED, asked(is_distributed=True)),
    ],
    ids=["no table", "none", "central", "distributed"],
)
def test_table_becomes_the_plans_privacy(plan_of, text, privacy):
    """The coordinator gets what the table asks for."""
    assert privacy_from_wire(plan_of(text)) == privacy


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SOUND + '[federation.privacy]\nname = "central"\n', r"privacy\.epsilon is missing"),
        (CENTRAL.replace("1e-5", "1"), r"privacy\.delta should be less than 1"),
        (CENTRAL.replace("= 4", "= 0"), r"noise_multiplier should be greater than 0"),
        (CENTRAL + '[federation.rule]\nname = "mean"\nclip = 1\n', "privacy takes the mean"),
        (
            DISTRIBUTED.replace("[fed", PLAIN),
            "devices add noise in secure rounds",
        ),
        (
            CENTRAL.replace("[fed", "[federation]\ngroups = 3\ncohort = 9\nmin_cohort = 9\n[fed"),
            "privacy takes one sum",
        ),
    ],
    ids=["no budget", "delta", "no noise", "rule", "plain", "groups"],
)
def test_mistake_in_the_table_is_explained(plan_of, text, words):
    """A mistake is told by the path that it has in the file, with what to do."""
    with pytest.raises(ProjectError, match=words):
        plan_of(text)


def test_quantile_becomes_a_bound_that_follows(plan_of):
    """With a quantile the bound follows the updates, whoever adds the noise to what."""
    for table in (CENTRAL.replace("[fed", PLAIN), CENTRAL, DISTRIBUTED):
        privacy = privacy_from_wire(plan_of(table + "quantile = 0.4\n"))
        assert privacy.clip == AdaptiveClip(quantile=0.4, learning_rate=0.2)
        privacy = privacy_from_wire(plan_of(table + "quantile = 0.4\nquantile_rate = 0.5\n"))
        assert privacy.clip == AdaptiveClip(quantile=0.4, learning_rate=0.5)
    with pytest.raises(ProjectError, match=r"privacy\.quantile should be less than 1"):
        plan_of(DISTRIBUTED + "quantile = 1\n")


def test_spending_is_told(plan_of):
    """Status and progress say what the newest round left spent, of how much, and the bound."""
    told = []
    campaign = pb.Campaign(plan=plan_of(CENTRAL), rounds=[pb.Round(number=1)])
    before = {"epsilon": 0, "delta": 1e-5, "budget": 8, "max_norm": 0.5}
    assert describe_campaign(campaign)["privacy"] == before
    campaign.rounds[0].privacy.epsilon = 1.23456
    campaign.rounds[0].privacy.max_norm = 0.4321
    described = describe_campaign(campaign)["privacy"]
    note = "epsilon 1.23 of 8 spent at delta 1e-05, updates up to 0.432 long"
    assert privacy_note(described) == note
    report_campaign(lambda progress: told.append(progress.note))(campaign)
    assert told[0].endswith(f"0 updates, {note}")
    assert describe_campaign(pb.Campaign(plan=plan_of(SOUND)))["privacy"] is None
    assert privacy_note(None) == ""
