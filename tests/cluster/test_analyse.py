"""`minga analyse`: a query from the command line to devices and back."""

import asyncio
import json
import sys

import numpy as np
import pytest

from minga.cluster.analyse import query_of
from minga.federation.analytics import ColumnQuery
from minga.federation.device.queries import Queries
from minga.federation.errors import CampaignError
from tests.federation.fleet import PATIENCE_S, Fleet

TASK = """
from minga.training import Maximize, Task


class Plant(Task):
    name = "plant"
    objective = Maximize("accuracy")

    def data(self, source): ...
    def model(self, params): ...
    def loss(self, outputs, targets): ...
    def metrics(self, outputs, targets): ...
"""

SETTINGS = """
task = "task.py:Plant"
[data]
source = "none"
[federation]
cohort = 5
min_cohort = 4
invite_timeout_s = 10
"""


@pytest.mark.slow
def test_query_from_the_command_line(tmp_path):
    """Statistics of five agents' rows come back as JSON; no agent's own are anywhere."""
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "minga.toml").write_text(SETTINGS)
    rows = [np.arange(10) + 10 * index for index in range(5)]
    words = ["analyse", "heat:0:100", "--bins", "2", "--quantile", "0.5"]
    printed = asyncio.run(asked(tmp_path, rows, words))
    result = json.loads(printed)
    assert (result["num_devices"], result["num_rows"]) == (5, 50)
    (column,) = result["columns"]
    everything = np.concatenate(rows)
    assert column["mean"] == pytest.approx(everything.mean(), abs=0.05)
    assert column["variance"] == pytest.approx(everything.var(), abs=1.0)
    assert column["histogram"] == pytest.approx([0, 1, 0, 0], abs=1e-3)
    assert column["quantiles"]["0.5"] == pytest.approx(24, abs=0.01)


async def asked(folder, rows, words):
    """Run five agents and a command beside them; gives what it printed."""
    queries = Queries(columns=frozenset({"heat"}))
    async with Fleet(folder) as fleet:
        for index, values in enumerate(rows):
            options = {"heat": ",".join(map(str, values))}
            await fleet.add(
                f"site-{index}", options, trainer="columns_trainer:make", queries=queries
            )
        places = ["--project", folder, "--state", folder / "coordinator", "--json"]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "minga.cli", *words, *places), stdout=asyncio.subprocess.PIPE
        )
        try:
            async with asyncio.timeout(PATIENCE_S):
                printed, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        assert process.returncode == 0
        return printed


def test_columns_as_they_are_written():
    """A column is a name and two bounds; bins are of equal width between them."""
    query = query_of(["a:b:0:4"], 2, [0.5])
    assert query.columns == (
        ColumnQuery(column="a:b", low=0.0, high=4.0, edges=(0.0, 2.0, 4.0), quantiles=(0.5,)),
    )
    for text in ("heat", "heat:low:high", "heat:4:0", ":0:1"):
        with pytest.raises(CampaignError, match="NAME:LOW:HIGH"):
            query_of([text], 0, [])
