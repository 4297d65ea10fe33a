"""A project's federation on virtual devices, with a record in MLflow.

What is simulated is what `minga federate` would run: the same `[federation]` table, Task and
hyper-parameters. Only the `[simulation]` table, which says what the devices are like, is its own.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from minga.cluster import pipeline
from minga.cluster.project import Project
from minga.cluster.stack import local_ray
from minga.federation.parameters import Parameters, to_bytes
from minga.training.bundle import LINEAGE, read_parameters
from minga.training.history import Record
from minga.training.lineage import Lineage
from minga.training.probe import probe
from minga.training.progress import OnProgress, Progress, silent
from minga.training.simulation.simulate import Simulated, Simulation
from minga.training.simulation.simulate import simulate as play
from minga.training.space import Params
from minga.training.tracking import Tracker

LOGGED_EVERY_S = 2.0
"""Rounds go to MLflow in batches: one transaction takes longer than a round of small models."""

WEIGHTS = "model.safetensors"
"""The last global model among a run's files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a simulation came to, and where its record is."""

    simulated: Simulated
    run_id: str
    params: Params
    metrics: Mapping[str, float]
    """Of the last model, on the test split."""


def simulate(
    project: Project,
    params: Params,
    on_progress: OnProgress = silent,
    *,
    start: str = "",
    fresh: bool = False,
) -> Report:
    """Play a project's campaign on virtual devices.

    Args:
        project: the project.
        params: complete hyper-parameters; those of `start` take their place.
        on_progress: hears of every round.
        start: the registered version, or its alias, to start from, as a real campaign does from
            the champion; empty: from untrained weights.
        fresh: start anew, even if an interrupted simulation is kept.

    Raises:
        DataError, TaskError, CampaignError, PrivacyError: see `minga.training.simulation`.
        RegistryError: there is no version `start`.
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    first: Parameters | None = None
    if start:
        registry = project.registry(on_progress)
        version = registry.get(project.loaded_task.name, start)
        folder = registry.fetch(version.name, version.version)
        params, first = dict(Lineage.read(folder / LINEAGE).params), read_parameters(folder)
        start = str(version.version)
    probe(project.loaded_task, params, project.splits)
    simulation = Simulation(
        task=project.loaded_task,
        splits=project.splits,
        federation=project.federation,
        config=project.simulation,
        params=params,
        seed=project.seed,
        root=project.directory,
        start=first,
    )
    settings = (project.federation, project.simulation, dict(params), start)
    state = project.ray_storage / f"simulate-{pipeline.fingerprint(project, settings)}.safetensors"
    if fresh:
        state.unlink(missing_ok=True)
    tracker = project.tracker(on_progress)
    tags = {"minga.step": "simulate", "minga.data_sha256": project.data_digest}
    with tracker.run("simulate", tags=tags) as run_id:
        tracker.log(run_id, params={**params, **_summary(project)})
        tracker.log_settings(run_id, project.model_dump(mode="json"))
        log = _Log(tracker, run_id, project, on_progress)
        simulated = play(
            simulation, reference=project.reference, ray=local_ray, on_round=log.note, state=state
        )
        log.finish(simulated.history)
        metrics = pipeline.evaluate(project, simulated.parameters, params)
        tracker.log(run_id, metrics={f"test_{name}": value for name, value in metrics.items()})
        tracker.log_file(run_id, WEIGHTS, to_bytes(simulated.parameters))
    return Report(simulated=simulated, run_id=run_id, params=params, metrics=metrics)


def _summary(project: Project) -> dict[str, str | int | float | bool]:
    """Give what one compares simulations by; all the rest is in the run's settings."""
    federation, simulation = project.federation, project.simulation
    return {
        "seed": project.seed,
        "num_rounds": federation.num_rounds,
        "cohort": federation.cohort,
        "protection": federation.protection,
        "server_optimizer": federation.server_optimizer.name,
        "rule": federation.rule.name,
        "privacy": federation.privacy.name,
        "scaffold": federation.scaffold,
        "partition": simulation.partition.name,
        **{f"training.{name}": value for name, value in federation.training.items()},
    }


class _Log:
    """Tells of rounds: the terminal of each, MLflow of several at once."""

    def __init__(
        self, tracker: Tracker, run_id: str, project: Project, on_progress: OnProgress
    ) -> None:
        self._tracker = tracker
        self._run_id = run_id
        self._metric = project.loaded_task.objective.metric
        self._num_rounds = project.federation.num_rounds
        self._on_progress = on_progress
        self._waiting: list[Record] = []
        self._logged: set[float] = set()
        self._logged_at = time.monotonic()
        on_progress(Progress(step="simulate", done=0, total=self._num_rounds))

    def note(self, record: Record) -> bool:
        """Take one round's record; never ends the simulation."""
        number = int(record["epoch"])
        note = f"{record['devices']:.0f} updates" if "devices" in record else "devices measured"
        for name in (self._metric, f"devices_{self._metric}"):
            note += f", {name} {record[name]:.4f}" if name in record else ""
        self._on_progress(Progress(step="simulate", done=number, total=self._num_rounds, note=note))
        self._waiting.append(record)
        self._logged.add(record["epoch"])
        if time.monotonic() - self._logged_at > LOGGED_EVERY_S:
            self._flush()
        return False

    def finish(self, history: tuple[Record, ...]) -> None:
        """Log what is left, and what an earlier call played before it was interrupted."""
        self._waiting += [record for record in history if record["epoch"] not in self._logged]
        self._flush()

    def _flush(self) -> None:
        if self._waiting:
            self._tracker.log(self._run_id, history=self._waiting)
        self._waiting, self._logged_at = [], time.monotonic()
