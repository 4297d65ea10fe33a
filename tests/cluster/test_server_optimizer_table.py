"""The [federation.server_optimizer] table: what it becomes, and how mistakes in it are told."""

import pytest

from minga.cluster.errors import ProjectError
from minga.cluster.project import load
from minga.federation.aggregation.optimizers import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedYogi,
)
from minga.federation.planning import campaign_plan
from minga.federation.wire import config_from_wire, optimizer_from_wire

SOUND = 'task = "task.py:T"\n[data]\nsource = "data/a.csv"\n'
TABLE = SOUND + "[federation.server_optimizer]\n"


@pytest.fixture
def plan_of(tmp_path):
    """Reads a minga.toml of the given text and writes its campaign's plan."""

    def read(text):
        (tmp_path / "minga.toml").write_text(text)
        config = load(tmp_path).federation
        return campaign_plan(config, model_name="m", parent_version="1", training={"lr": 0.1})

    return read


@pytest.mark.parametrize(
    ("text", "optimizer"),
    [
        (SOUND, FedAvg(learning_rate=1.0)),
        (TABLE + 'name = "fedavg"\nlearning_rate = 0.5\n', FedAvg(learning_rate=0.5)),
        (TABLE + 'name = "fedavgm"\n', FedAvgM(learning_rate=1.0, momentum=0.9)),
        (
            TABLE + 'name = "fedadagrad"\ntau = 0.01\n',
            FedAdagrad(learning_rate=0.1, beta_1=0.0, tau=0.01),
        ),
        (
            TABLE + 'name = "fedadam"\nlearning_rate = 0.03\nbeta_1 = 0\n',
            FedAdam(learning_rate=0.03, beta_1=0.0, beta_2=0.99, tau=1e-3),
        ),
        (
            TABLE + 'name = "fedyogi"\nbeta_2 = 0.999\n',
            FedYogi(learning_rate=0.1, beta_1=0.9, beta_2=0.999, tau=1e-3),
        ),
    ],
    ids=["no table", "fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi"],
)
def test_table_becomes_the_plans_optimizer(plan_of, text, optimizer):
    """The coordinator gets the optimiser that the table names, with the numbers it has."""
    assert optimizer_from_wire(plan_of(text)) == optimizer


def test_pull_reaches_the_devices(plan_of):
    """proximal_mu goes into the training configuration that devices get and sign."""
    plan = plan_of(SOUND + "[federation.training]\nproximal_mu = 0.01\n")
    assert config_from_wire(plan.training) == {"lr": 0.1, "proximal_mu": 0.01}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            TABLE + "beta_1 = 0.5\n",
            r"federation\.server_optimizer\.name is missing; add one of fedavg, fedavgm",
        ),
        (TABLE + 'name = "fedadm"\n', r"name should be one of fedavg, .*, not 'fedadm'"),
        (
            TABLE + 'name = "fedadam"\nbeta_3 = 1\n',
            r"unknown key federation\.server_optimizer\.beta_3; did you mean beta_",
        ),
        (
            TABLE + 'name = "fedavg"\nmomentum = 0.9\n',
            r"unknown key federation\.server_optimizer\.momentum; .* learning_rate",
        ),
        (
            TABLE + 'name = "fedadam"\nbeta_1 = 1.0\ntau = 0\n',
            r"server_optimizer\.beta_1 should be less than 1.*server_optimizer\.tau should be",
        ),
        (
            TABLE + 'name = "fedavgm"\nlearning_rate = inf\n',
            r"learning_rate should be a finite number, not inf",
        ),
        (
            SOUND + "[federation.training]\nproximal_mu = -1\n",
            r"federation\.training proximal_mu is -1; give a number from 0 on",
        ),
        (SOUND + "[federation]\nserver_learning_rate = 1\n", "known are .*server_optimizer"),
    ],
    ids=["no name", "no such", "unknown", "another's", "range", "inf", "pull", "former key"],
)
def test_mistake_in_the_table_is_explained(plan_of, text, words):
    """A mistake is told by the path that it has in the file, with what to do."""
    with pytest.raises(ProjectError, match=words):
        plan_of(text)
