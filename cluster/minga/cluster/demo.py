"""The whole loop on one machine, on real data: what `minga demo` runs.

It writes a project like `minga init` does, then goes the way that a user would go by hand, with
the same functions and, for coordinator and devices, the same commands in processes of their own:

    data check -> search -> train -> gate, register -> serve -> federate -> gate, register,
    promote -> swap under traffic -> devices run the new version

In one round a device is killed after it shared its keys; the round must end with the exact sum of
the others. Requests flow from the first version on; none may fail.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from minga.cluster import pipeline, template
from minga.cluster.checking import require_valid_data
from minga.cluster.demo_report import (
    DemoReport,
    DeviceAnswer,
    KilledDevice,
    TrafficReport,
)
from minga.cluster.errors import DemoError
from minga.cluster.federate import Federated, federate, publish
from minga.cluster.fleet import committed, describe_devices, report_campaign
from minga.cluster.following import following_champion
from minga.cluster.pipeline import Registered
from minga.cluster.processes import LocalFleet
from minga.cluster.project import Project, load
from minga.cluster.stack import local_ray
from minga.cluster.traffic import Tally, Traffic
from minga.cluster.victim import Victim
from minga.federation.device.enrolment import enrol
from minga.federation.operator import connect
from minga.federation.v1 import federation_pb2 as pb
from minga.inference.client import InferenceClient
from minga.training.data import read_splits
from minga.training.evaluate import evaluate
from minga.training.export import INPUT, OUTPUT
from minga.training.loop import Learner, fit
from minga.training.network import build_network
from minga.training.progress import OnProgress, Progress
from minga.training.registry import CHAMPION, Version
from minga.training.space import Params
from minga.training.task import Splits

RECONNECT_GRACE_S = 2.0
TOKEN_LIFETIME_S = 600
WAIT_S = 60.0
NUM_QUESTIONS = 32
MAX_DIFFERENCE = 1e-5
"""Between a device's answer and the central one: the same file on the same kind of engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """How large the demo is."""

    num_sites: int = 8
    num_rounds: int = 5
    num_trials: int = 8
    max_epochs: int = 8
    epochs: int = 10
    seed: int = 7

    def applied_to(self, project: Project) -> Project:
        """Give a project of this size."""
        search = {"num_trials": self.num_trials, "max_epochs": self.max_epochs}
        training = {"num_workers": 2, "epochs": self.epochs}
        federation = {
            "num_rounds": self.num_rounds,
            "cohort": self.num_sites,
            "min_cohort": max(3, self.num_sites // 2),
        }
        return project.model_copy(
            update={
                "seed": self.seed,
                "search": project.search.model_copy(update=search),
                "training": project.training.model_copy(update=training),
                "federation": project.federation.model_copy(update=federation),
            }
        )


@dataclass(slots=True)
class Demo:
    """One demo under way.

    Args:
        folder: is filled; must be empty.
        config: how large it is.
        on_progress: told how far it is.
    """

    folder: Path
    config: DemoConfig
    on_progress: OnProgress
    times_s: dict[str, float] = field(default_factory=dict)

    def run(self) -> DemoReport:
        """Run all steps.

        Raises:
            DemoError: a result is not what it must be.
            Exception: what a step raises; each has a message for the user.
        """
        with ExitStack() as stack:
            with self._step("data"):
                project = self._write_project()
                require_valid_data(project)
            with self._step("start Ray"):
                stack.enter_context(local_ray())
            central, params = self._train_centrally(project)
            with self._step("serve"):
                url = stack.enter_context(following_champion(project))
                traffic = stack.enter_context(self._traffic(project, url))
            fleet = stack.enter_context(LocalFleet(self.folder))
            with self._step("enrol"):
                self._enrol(project, fleet)
            with self._step("federate"):
                restart = partial(self._start, project, fleet)
                victim = Victim(self._largest_site(), restart, fleet)
                federated = self._federate(project, fleet, victim)
                killed = self._check_killed(project, victim)
            with self._step("swap"):
                version = str(_champion(project).version)
                if not federated.promoted:  # its devices get the champion that stayed
                    publish(project, fleet.state)
                self._until(lambda: traffic.tally.versions[-1:] == [version], "Serve swaps")
            with self._step("devices"):
                devices = self._ask_devices(project, fleet, url, version)
                peak = fleet.child("coordinator").peak_memory_bytes()
        with self._step("sites alone"):
            sites = {name: self._train_alone(project, params, name) for name in self.sites}
        return self._report(
            central=central,
            federated=federated,
            killed=killed,
            tally=traffic.tally,
            devices=devices,
            sites=sites,
            peak_memory_bytes=peak,
        )

    @property
    def sites(self) -> list[str]:
        """The devices' names."""
        return [f"site-{index}" for index in range(self.config.num_sites)]

    # --- central path ---

    def _write_project(self) -> Project:
        folder = self.folder / "project"
        template.write(folder, num_sites=self.config.num_sites)
        return self.config.applied_to(load(folder))

    def _train_centrally(self, project: Project) -> tuple[Registered, Params]:
        with self._step("search"):
            found = pipeline.search(project, self.on_progress)
        with self._step("train"):
            trained = pipeline.train_model(project, found.params, self.on_progress)
        with self._step("register"):
            registered = pipeline.register_candidate(
                project,
                parameters=trained.parameters,
                params=found.params,
                run_id=trained.run_id,
                on_progress=self.on_progress,
            )
            pipeline.promote(project, registered.version)
        return registered, found.params

    def _train_alone(self, project: Project, params: Params, name: str) -> dict[str, float]:
        """Train on one site's data alone, as long as the central model, from random weights."""
        task, splits = project.loaded_task, self._splits_of(project, name)
        network = build_network(task, params, splits.train, seed=project.seed)
        fit(
            Learner(task, network, params),
            splits.train,
            epochs=project.training.epochs,
            seed=project.seed,
        )
        return evaluate(task, network, project.splits.test)

    # --- serving ---

    def _traffic(self, project: Project, url: str) -> Traffic:
        """Ask once, to see that it answers; then keep asking."""
        name, questions = project.loaded_task.name, project.splits.test.inputs
        with InferenceClient(url) as client:
            client.infer(name, {INPUT: questions[:1]})
        return Traffic(url, name, questions)

    # --- fleet ---

    def _enrol(self, project: Project, fleet: LocalFleet) -> None:
        fleet.start_coordinator(reconnect_grace_s=RECONNECT_GRACE_S)
        asyncio.run(self._enrol_all(fleet))
        for index, name in enumerate(self.sites):
            self._start(project, fleet, name)
            self._tell("enrol", index + 1, self.config.num_sites, name)

    async def _enrol_all(self, fleet: LocalFleet) -> None:
        async with connect(fleet.state) as operator:
            for name in self.sites:
                token = await operator.create_token("default", TOKEN_LIFETIME_S)
                await enrol(token.token, fleet.device_folder(name), name)

    def _start(self, project: Project, fleet: LocalFleet, name: str) -> None:
        source = project.directory / "data" / f"{name}.csv"
        fleet.start_device(name, project=project.directory, source=source)

    def _federate(self, project: Project, fleet: LocalFleet, victim: Victim) -> Federated:
        report = report_campaign(self.on_progress)

        def on_campaign(campaign: pb.Campaign) -> None:
            victim.watch(campaign)
            report(campaign)

        return federate(project, fleet.state, on_campaign=on_campaign, on_progress=self.on_progress)

    def _largest_site(self) -> str:
        """Name the site with the most data: it trains longest, so there is time to kill it."""
        data = self.folder / "project" / "data"
        return max(self.sites, key=lambda name: (data / f"{name}.csv").stat().st_size)

    def _check_killed(self, project: Project, victim: Victim) -> KilledDevice:
        """Insist that the round without the killed device has the exact sum of the others."""
        round_ = victim.round
        if round_ is None:
            raise DemoError(
                f"{victim.name} was to be killed after it had shared its keys, but its updates "
                "were always faster; run the demo again"
            )
        cap = project.federation.max_weight
        weights = (len(self._splits_of(project, name).train) for name in round_.survivors)
        expected = sum(min(weight, cap) for weight in weights)
        if round_.total_weight != expected:
            raise DemoError(
                f"the sum of round {round_.number} has weight {round_.total_weight}, "
                f"its devices have {expected}"
            )
        return KilledDevice(
            device=victim.name,
            round_number=round_.number,
            survivors=tuple(round_.survivors),
            total_weight=round_.total_weight,
            expected_weight=expected,
        )

    def _ask_devices(
        self, project: Project, fleet: LocalFleet, url: str, version: str
    ) -> tuple[DeviceAnswer, ...]:
        """Wait until every device runs the version, then compare its answers to central ones."""
        running: dict[str, str] = {}

        def all_run_it() -> bool:
            rows = asyncio.run(describe_devices(fleet.state))
            running.update(
                (row["device"], row["model_sha256"])
                for row in rows
                if row["model_version"] == version and row["model_state"] == "active"
            )
            self._tell("devices", len(running), self.config.num_sites, f"version {version}")
            return len(running) == self.config.num_sites

        self._until(all_run_it, "every device runs the new version")
        name = project.loaded_task.name
        questions = project.splits.test.inputs[:NUM_QUESTIONS]
        with InferenceClient(url) as client:
            central = client.infer(name, {INPUT: questions}, version=version)[OUTPUT]
        digest = _champion(project).digests.onnx
        answers = []
        for device in self.sites:
            with InferenceClient(fleet.endpoint(device)) as client:
                own = client.infer(name, {INPUT: questions}, version=version)[OUTPUT]
            difference = float(np.abs(own - central).max())
            if running[device] != digest or difference > MAX_DIFFERENCE:
                raise DemoError(f"{device} answers differently by {difference:g}, or another file")
            answers.append(
                DeviceAnswer(
                    device=device, version=version, sha256=digest, max_difference=difference
                )
            )
        return tuple(answers)

    # --- the report ---

    def _report(
        self,
        *,
        central: Registered,
        federated: Federated,
        killed: KilledDevice,
        tally: Tally,
        devices: tuple[DeviceAnswer, ...],
        sites: dict[str, dict[str, float]],
        peak_memory_bytes: int,
    ) -> DemoReport:
        if tally.num_failures:
            raise DemoError(
                f"{tally.num_failures} of {tally.num_requests} requests failed, "
                f"the first with: {tally.first_failure}"
            )
        rounds = committed(federated.campaign)
        traffic = sum(r.bytes_received + r.bytes_sent for r in rounds)
        alone = {
            metric: float(np.mean([metrics[metric] for metrics in sites.values()]))
            for metric in central.report.metrics
        }
        return DemoReport(
            metrics={
                "site alone (mean)": alone,
                "central only": dict(central.report.metrics),
                "federated": dict(federated.registered.report.metrics),
            },
            sites_alone=sites,
            promoted=federated.promoted,
            champion_version=devices[0].version,
            num_rounds=len(rounds),
            cohort=max(len(r.survivors) for r in rounds),
            bytes_per_device_per_round=traffic / sum(len(r.invited) for r in rounds),
            coordinator_peak_memory_bytes=peak_memory_bytes,
            killed=killed,
            traffic=TrafficReport(
                num_requests=tally.num_requests,
                num_failures=tally.num_failures,
                versions=tuple(tally.versions),
                p50_ms=float(np.quantile(tally.latencies_s, 0.5) * 1000),
                p99_ms=float(np.quantile(tally.latencies_s, 0.99) * 1000),
            ),
            devices=devices,
            times_s=self.times_s,
            folder=str(self.folder),
        )

    # --- helpers of all steps ---

    def _splits_of(self, project: Project, name: str) -> Splits:
        return read_splits(project.loaded_task, str(project.directory / "data" / f"{name}.csv"))

    @contextmanager
    def _step(self, name: str) -> Iterator[None]:
        self._tell(name, 0, 1)
        start = time.perf_counter()
        yield
        self.times_s[name] = time.perf_counter() - start
        self._tell(name, 1, 1, f"{self.times_s[name]:.1f} s")

    def _tell(self, step: str, done: int, total: int, note: str = "") -> None:
        self.on_progress(Progress(step=step, done=done, total=total, note=note))

    def _until(self, is_done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not is_done():
            if time.monotonic() > deadline:
                raise DemoError(f"waited {WAIT_S:g} s in vain until {what}; see {self.folder}/logs")
            time.sleep(0.1)


def _champion(project: Project) -> Version:
    return project.registry().get(project.loaded_task.name, CHAMPION)
