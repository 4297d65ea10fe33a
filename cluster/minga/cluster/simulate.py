"""A project's federation on virtual devices, with a record in MLflow.

What is simulated is what `minga federate` would run: the same `[federation]` table, Task and
hyper-parameters. Only the `[simulation]` table, which says what the devices are like, is its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from minga.cluster import pipeline
from minga.cluster.checking import data_tags, require_valid_data
from minga.cluster.occupation import occupied
from minga.cluster.project import Project
from minga.cluster.stack import local_ray
from minga.federation.parameters import Parameters, to_bytes
from minga.training.bundle import LINEAGE, read_parameters
from minga.training.history import Record
from minga.training.lineage import Lineage
from minga.training.probe import probe
from minga.training.progress import OnProgress, Progress, silent
from minga.training.recording import Recorder, recording
from minga.training.simulation.simulate import Simulated, Simulation
from minga.training.simulation.simulate import simulate as play
from minga.training.space import Params

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

    Rounds are in MLflow and TensorBoard while it goes on; what was interrupted goes on in the same
    run.

    Args:
        project: the project.
        params: complete hyper-parameters; those of `start` take their place.
        on_progress: hears of every round.
        start: the registered version, or its alias, to start from, as a real campaign does from
            the champion; empty: from untrained weights.
        fresh: start anew, even if an interrupted simulation is kept.

    Raises:
        SchemaError: the data breaks its schema; nothing was started.
        BusyError: another process works in the project.
        DataError, TaskError, CampaignError, PrivacyError: see `minga.training.simulation`.
        RegistryError: there is no version `start`.
        KeyboardInterrupt: the user stopped it; the same call goes on.
    """
    require_valid_data(project)
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
    kept = state.with_suffix(".run")
    tracker = project.tracker(on_progress)
    tags = {"minga.step": "simulate", **data_tags(project)}
    with occupied(project):
        if fresh:
            state.unlink(missing_ok=True)
            kept.unlink(missing_ok=True)
        with tracker.run("simulate", tags=tags, kept=kept) as run_id:
            tracker.log(run_id, params={**params, **_summary(project)})
            tracker.log_settings(run_id, project.model_dump(mode="json"))
            with recording(tracker, project.tensorboard_folder) as recorder:
                recorder.open(run_id, f"simulate-{run_id[:8]}")
                log = _Log(recorder, run_id, project, on_progress)
                simulated = play(
                    simulation,
                    reference=project.reference,
                    ray=local_ray,
                    on_round=log.note,
                    state=state,
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
    """Tells of rounds: the terminal, and the run's record."""

    def __init__(
        self, recorder: Recorder, run_id: str, project: Project, on_progress: OnProgress
    ) -> None:
        self._recorder = recorder
        self._run_id = run_id
        self._metric = project.loaded_task.objective.metric
        self._num_rounds = project.federation.num_rounds
        self._on_progress = on_progress
        on_progress(Progress(step="simulate", done=0, total=self._num_rounds))

    def note(self, record: Record) -> bool:
        """Take one round's record; never ends the simulation."""
        number = int(record["epoch"])
        note = f"{record['devices']:.0f} updates" if "devices" in record else "devices measured"
        for name in (self._metric, f"devices_{self._metric}"):
            note += f", {name} {record[name]:.4f}" if name in record else ""
        self._on_progress(Progress(step="simulate", done=number, total=self._num_rounds, note=note))
        self._recorder.note(self._run_id, record)
        return False

    def finish(self, history: tuple[Record, ...]) -> None:
        """Record what an earlier call played and was killed before it recorded it."""
        for record in history:
            self._recorder.note(self._run_id, record)
