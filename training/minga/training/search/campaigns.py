"""Trials that are campaigns on virtual devices: `[search] over = "simulation"`.

A trial's hyper-parameters are those of the devices' training; all else is as the project says it.
Its rounds stand in the place of epochs: each is reported, and a trial that is behind is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minga.federation.config import FederationConfig
from minga.training.errors import TaskError
from minga.training.history import Record
from minga.training.search.ledger import Entry
from minga.training.simulation.config import SimulationConfig
from minga.training.simulation.simulate import Simulation, require_playable, simulate
from minga.training.simulation.state import read_state
from minga.training.space import Params
from minga.training.task import Splits, Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Federation:
    """What campaigns of a search have in common."""

    config: FederationConfig
    devices: SimulationConfig
    root: Path
    """Where patterns of sources start."""

    def simulation(
        self, task: Task, splits: Splits, params: Params, *, num_rounds: int, seed: int
    ) -> Simulation:
        """Give the campaign of some hyper-parameters, all of it in one process."""
        return Simulation(
            task=task,
            splits=splits,
            federation=self.config.model_copy(update={"num_rounds": num_rounds}),
            config=self.devices.model_copy(update={"measure_every": 1, "workers": 1}),
            params=params,
            seed=seed,
            root=self.root,
        )


def require_searchable(
    federation: Federation, task: Task, splits: Splits, *, num_rounds: int, seed: int
) -> None:
    """Refuse what no trial could do, before any begins.

    Raises:
        TaskError: a hyper-parameter is searched and set as well.
        DataError, CampaignError, PrivacyError, ShapeError: see `simulate`.
    """
    twice = sorted(task.search_space.keys() & federation.config.training.keys())
    if twice:
        raise TaskError(
            f"{', '.join(twice)}: searched, and set in [federation.training], which would hold in "
            "every trial; take it out of one of them"
        )
    require_playable(
        federation.simulation(task, splits, task.defaults, num_rounds=num_rounds, seed=seed)
    )


def play_trial(
    simulation: Simulation, entry: Entry, file: Path, report: Callable[[Record], None]
) -> None:
    """Play a trial's campaign to its end, from where its file left it.

    Rounds since that was last written are played again, and come out the same.

    Args:
        simulation: the campaign.
        entry: of the trial, with the rounds that are known already.
        file: where the campaign's state is kept.
        report: gets each round that is new.

    Raises:
        CampaignError: with these hyper-parameters rounds come to nothing.
    """
    if len(entry.history) >= simulation.federation.num_rounds:
        return
    metric = simulation.task.objective.metric
    kept = read_state(file)[1] if file.exists() else []
    for record in kept[len(entry.history) :]:
        report(record)

    def note(record: Record) -> bool:
        if metric in record:  # else it is what devices measured of the round before
            report(record)
        return False

    simulate(simulation, on_round=note, state=file)
