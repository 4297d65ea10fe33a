"""`simulate`: a campaign on virtual devices, from its first model to its last."""

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import nn

from minga.federation.config import FederationConfig
from minga.federation.coordinator.aggregate import Recipe
from minga.federation.errors import CampaignError
from minga.federation.parameters import Parameters
from minga.federation.planning import campaign_plan
from minga.federation.v1 import federation_pb2 as pb
from minga.training.errors import TaskError
from minga.training.evaluate import evaluate
from minga.training.history import Record
from minga.training.network import build_network, load_parameters, parameters_of
from minga.training.simulation.campaign import VirtualCampaign
from minga.training.simulation.config import SimulationConfig
from minga.training.simulation.crew import Crew, RayCrew, Worker
from minga.training.simulation.fleet import Fleet
from minga.training.simulation.partition import Population, populate
from minga.training.simulation.parts import Parts
from minga.training.simulation.state import read_state, write_state
from minga.training.space import Params
from minga.training.task import Splits, Task, TaskReference

OnRound = Callable[[Record], bool]
"""Gets each committed round's record; True ends the simulation."""

STATE_SHARE: Final = 0.05
"""So much of the time may go into writing down the state."""

STATE_EVERY_S: Final = 5.0
"""The state is written down no more often than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What is to be simulated: all that decides what comes out."""

    task: Task
    splits: Splits
    """Of the whole: devices divide training and validation split among them."""
    federation: FederationConfig
    config: SimulationConfig
    params: Params
    """Hyper-parameters: of the network, and of devices' training."""
    seed: int = 0
    root: Path = Path()
    """Where patterns of sources start."""
    start: Parameters | None = None
    """The parameters of the first model; untrained ones if there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What a simulation came to."""

    campaign: pb.Campaign
    history: tuple[Record, ...]
    """A record for each committed round: `epoch` is its number, then what the global model measured
    on the validation split (metrics, `loss`), `devices`, `examples`, `simulated_s`, and where the
    campaign has them `epsilon` and what devices measured (`devices_<metric>`)."""
    parameters: Parameters
    """The last model's, the whole network's."""
    num_devices: int
    one_by_one: str
    """Why devices were not trained together; empty if they were."""
    seconds: float
    """How long the rounds took that this call played, and to measure the model."""
    num_rounds: int
    """How many rounds this call played."""
    finished: bool
    """False if `on_round` ended it."""


def simulate(
    simulation: Simulation,
    *,
    reference: TaskReference | None = None,
    on_round: OnRound | None = None,
    state: Path | None = None,
) -> Simulated:
    """Play a campaign on virtual devices.

    Args:
        simulation: what is played.
        reference: of the Task, for workers on Ray; without it, or with `workers = 1`, all is done
            in this process.
        on_round: hears of each committed round, and may end the simulation.
        state: a file that the state is written to now and then, and at Ctrl-C; if it is there the
            simulation goes on from it, with the same result. It is deleted at the end.

    Raises:
        DataError: the data cannot be divided as the table says.
        CampaignError: the campaign cannot work, or several rounds in a row came to nothing.
        PrivacyError: its budget does not pay for its rounds.
        TaskError, ShapeError: the Task cannot be used.
        KeyboardInterrupt: the user stopped it; with `state` the same call goes on.
    """
    task, config, seed = simulation.task, simulation.config, simulation.seed
    population = populate(
        task, simulation.splits, config.partition, seed=seed, root=simulation.root
    )
    plan = _plan(simulation, population)
    network = build_network(task, _params(simulation), simulation.splits.train, seed=seed)
    start = simulation.start or parameters_of(network)
    load_parameters(network, start)
    parts = Parts.of(start, plan.personal, scaffold=plan.scaffold)
    with _crew(simulation, population, reference) as crew:
        fleet = Fleet.of(task, population, config, parts, crew, seed)
        running = VirtualCampaign(plan, fleet, parts.first(start, plan.personal), seed)
        player = _Player(simulation, running, network, state)
        return player.play(on_round)
