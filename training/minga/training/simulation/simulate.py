"""`simulate`: a campaign on virtual devices, from its first model to its last."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import nn

from minga.federation.config import FederationConfig
from minga.federation.coordinator.campaign import require_possible
from minga.federation.errors import CampaignError
from minga.federation.parameters import Layout, Parameters
from minga.federation.parts import split_personal
from minga.federation.planning import campaign_plan
from minga.federation.v1 import federation_pb2 as pb
from minga.training.evaluate import evaluate
from minga.training.history import Record
from minga.training.network import build_network, load_parameters, parameters_of
from minga.training.simulation.campaign import VirtualCampaign
from minga.training.simulation.config import SimulationConfig
from minga.training.simulation.crew import Crew, RayCrew, Worker
from minga.training.simulation.effort import is_worth_dividing, operations_of_round
from minga.training.simulation.fleet import Fleet
from minga.training.simulation.lesson import Way
from minga.training.simulation.partition import Population, populate
from minga.training.simulation.parts import Parts
from minga.training.simulation.state import State, read_state, write_state
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
    num_workers: int
    """How many processes trained them."""
    way: Way | None
    """How devices were trained in the last round; None if there was no round left."""
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
    ray: Callable[[], AbstractContextManager[object]] = nullcontext,
    on_round: OnRound | None = None,
    state: Path | None = None,
) -> Simulated:
    """Play a campaign on virtual devices.

    Args:
        simulation: what is played.
        reference: of the Task, for workers on Ray; without it, with `workers = 1`, or with 0 and
            rounds that are too little work to divide, all is done in this process.
        ray: what Ray runs in while there are workers; by default it runs already.
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
    stage = _Stage.of(simulation)
    seed, parts = simulation.seed, stage.parts
    with _crew(simulation, stage, reference, ray) as crew:
        fleet = Fleet.of(
            simulation.task, stage.population, simulation.config, parts=parts, crew=crew, seed=seed
        )
        first = parts.first(stage.start, stage.plan.personal)
        running = VirtualCampaign(stage.plan, fleet, first, seed)
        player = _Player(simulation, running, stage.network, state)
        return player.play(on_round)


def require_playable(simulation: Simulation) -> None:
    """Refuse, as `simulate` does before its first round, what cannot be simulated."""
    _Stage.of(simulation)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """What a campaign begins with."""

    population: Population
    plan: pb.CampaignPlan
    network: nn.Module
    start: Parameters
    parts: Parts

    @classmethod
    def of(cls, simulation: Simulation) -> "_Stage":
        task, seed = simulation.task, simulation.seed
        population = populate(
            task, simulation.splits, simulation.config.partition, seed=seed, root=simulation.root
        )
        plan = _plan(simulation, population)
        network = build_network(task, _params(simulation), simulation.splits.train, seed=seed)
        start = simulation.start or parameters_of(network)
        load_parameters(network, start)
        parts = Parts.of(start, plan.personal, scaffold=plan.scaffold)
        require_possible(plan, Layout.of(split_personal(start, plan.personal)[0]))
        return cls(population=population, plan=plan, network=network, start=start, parts=parts)


def _params(simulation: Simulation) -> dict[str, Any]:
    """Give what a network is built with: the table's training overrides hyper-parameters."""
    return {
        **simulation.task.defaults,
        **simulation.params,
        **simulation.federation.training,
        "seed": simulation.seed,
    }


def _plan(simulation: Simulation, population: Population) -> pb.CampaignPlan:
    """Write the plan of the campaign, as `minga federate` does; refuse what cannot work."""
    federation, task = simulation.federation, simulation.task
    if federation.flower.client_app or federation.flower.strategy:
        raise CampaignError(
            "apps and strategies of Flower are not simulated; leave [federation.flower] out, or "
            "run it on real devices: minga federate"
        )
    if len(population) < federation.min_cohort:
        raise CampaignError(
            f"{len(population)} virtual devices are fewer than min_cohort {federation.min_cohort}; "
            "raise [simulation.partition] devices"
        )
    plan = campaign_plan(
        federation,
        model_name=task.name,
        parent_version="",
        training={**simulation.task.defaults, **simulation.params, "seed": simulation.seed},
        metrics=("loss", task.objective.metric),
    )
    plan.model_digest = bytes(32)
    return plan


@contextmanager
def _crew(
    simulation: Simulation,
    stage: _Stage,
    reference: TaskReference | None,
    ray: Callable[[], AbstractContextManager[object]],
) -> Iterator[Crew]:
    config, population, told = simulation.config, stage.population, _params(simulation)
    if (
        reference is None
        or config.workers == 1
        or not (config.workers or _is_much(simulation, stage))
    ):
        yield Worker(simulation.task, population, told, vectorise=config.vectorise)
        return
    with (
        ray(),
        RayCrew(
            reference,
            population,
            told,
            num_workers=config.workers,
            vectorise=config.vectorise,
        ) as crew,
    ):
        yield crew


def _is_much(simulation: Simulation, stage: _Stage) -> bool:
    """Tell whether a round is work enough for several processes."""
    cohort = simulation.federation.cohort
    operations = operations_of_round(
        stage.network,
        stage.population,
        cohort=cohort,
        epochs=int(simulation.federation.training.get("epochs", 1)),
    )
    update_bytes = 4.0 * cohort * stage.parts.network.num_values
    return not simulation.config.vectorise or is_worth_dividing(operations, update_bytes)


class _Player:
    """Plays rounds, measures the model, and writes down where it is."""

    def __init__(
        self,
        simulation: Simulation,
        running: VirtualCampaign,
        network: nn.Module,
        state: Path | None,
    ) -> None:
        self._simulation = simulation
        self._running = running
        self._network = network
        self._file = state
        self._history: list[Record] = []
        self._written_at = time.monotonic()
        self._writing_s = 0.0

    def play(self, on_round: OnRound | None) -> Simulated:
        """Play all rounds that are left."""
        running, num_rounds, is_ended = self._running, 0, False
        if self._file is not None and self._file.exists():
            state, self._history = read_state(self._file)
            running.resume(state)
        started_at = time.perf_counter()
        state, history = running.state(), list(self._history)
        try:
            while not is_ended and (record := running.next_round()) is not None:
                num_rounds += 1
                found = self._note(record)
                is_ended = found is not None and on_round is not None and on_round(found)
                state, history = running.state(), list(self._history)
                self._write_now_and_then(state, history)
        except KeyboardInterrupt:  # the round under way is played again
            raise KeyboardInterrupt(self._keep(state, history)) from None
        seconds = time.perf_counter() - started_at
        if self._file is not None:
            self._file.unlink(missing_ok=True)
        return Simulated(
            campaign=running.campaign.describe(),
            history=tuple(self._history),
            parameters=self._parameters(),
            num_devices=len(running.fleet.population),
            num_workers=running.fleet.crew.num_workers,
            way=running.fleet.crew.way,
            one_by_one=running.fleet.crew.one_by_one,
            seconds=seconds,
            num_rounds=num_rounds,
            finished=not is_ended,
        )

    def _note(self, record: pb.Round) -> Record | None:
        """Put a round into the history; give what is new to know of it."""
        if record.stage != pb.ROUND_STAGE_COMMITTED:
            return None
        if record.work == pb.ROUND_WORK_EVALUATION:
            measured = {f"devices_{name}": value for name, value in record.metrics.items()}
            self._history[-1] |= measured
            return {"epoch": record.number, **measured}
        found: Record = {
            "epoch": record.number,
            "devices": len(record.survivors),
            "examples": record.total_weight,
            "simulated_s": self._running.now,
        }
        if record.HasField("privacy"):
            found["epsilon"] = record.privacy.epsilon
        every = self._simulation.config.measure_every
        if record.number % every == 0 or record.number == self._simulation.federation.num_rounds:
            load_parameters(self._network, self._parameters())
            found |= evaluate(
                self._simulation.task, self._network, self._simulation.splits.validation
            )
        self._history.append(found)
        return found

    def _parameters(self) -> Parameters:
        """Give the whole network's parameters; tensors that did not travel are as at first."""
        parts = self._running.fleet.parts
        shared = parts.shared(self._running.travelling)
        values = parts.network.flatten(parameters_of(self._network))
        values[parts.is_shared] = shared
        return parts.network.unflatten(values)

    def _write_now_and_then(self, state: State, history: list[Record]) -> None:
        """Write the state down, if enough time went by for what that takes."""
        since = time.monotonic() - self._written_at
        if self._file is not None and since > max(STATE_EVERY_S, self._writing_s / STATE_SHARE):
            self._keep(state, history)

    def _keep(self, state: State, history: list[Record]) -> str:
        """Write the state down, and say what is kept."""
        if self._file is None:
            return ""
        before = time.monotonic()
        write_state(self._file, state, history)
        self._written_at = time.monotonic()
        self._writing_s = self._written_at - before
        return f"{len(history)} rounds are kept; the same command goes on from there"
