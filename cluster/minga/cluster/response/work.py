"""The work of one case, in a process: `python -m minga.cluster.response.work PROJECT CASE`.

    train | campaign -> judge and register -> [signatures] -> [canary] -> promote -> tell devices

Each step is in the journal once it is done, and is not done again by whoever comes after a crash;
what the crash left between a step and its entry is found again: a finished training by its weights
in the case's folder, a registered version by its run or campaign, a campaign by its being new at
the coordinator. A second process for the same case waits for the first one.
"""

import asyncio
import fcntl
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from minga.cluster import pipeline
from minga.cluster.errors import BusyError, ResponseError, StackError
from minga.cluster.federate import params_of, publish, start, take_in
from minga.cluster.fleet import follow_campaign
from minga.cluster.pipeline import Registered
from minga.cluster.project import Project, load
from minga.cluster.response.journal import Journal
from minga.cluster.response.policy import DAY_S, STALE, Case, Kind
from minga.cluster.response.responder import case_folder, open_journal
from minga.federation.durable import replace_file
from minga.federation.errors import UnreachableError
from minga.federation.operator import Operator, connect
from minga.federation.parameters import Parameters, from_bytes, to_bytes
from minga.federation.v1 import federation_pb2 as pb
from minga.inference.comparing import Mode
from minga.inference.uris import redacted
from minga.serving.book import Plan, Status, Story
from minga.serving.errors import RegistryUnreachableError, ServingError
from minga.serving.judging import Expectation
from minga.serving.registry_source import RegistrySource
from minga.training.errors import ApprovalError
from minga.training.registry import CHAMPION, Version
from minga.training.space import is_network

_log = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"
T = TypeVar("T")

_BUSY_PAUSE_S = 5.0
_LOOK_AGAIN_S = 1.0
_PASSING = (UnreachableError, StackError, RegistryUnreachableError)
"""Errors that another attempt may not meet."""


def work(project: Project, journal: Journal, number: int) -> None:
    """Take a case as far as it goes without a person.

    Raises:
        UnreachableError: the coordinator is away; try again.
        StackError: Ray is away; try again.
    """
    with _turn(case_folder(project, number) / "lock"):
        case = journal.case(number)
        if case.end is not None or case.awaited(project.respond):
            return
        journal.tell(Kind.STARTED, number, attempt=case.attempts + 1)
        try:
            _Work(project, journal, case).run()
        except _PASSING:
            raise
        except ResponseError as error:  # a person has dismissed it meanwhile
            _log.info("%s", error)
        except ApprovalError as error:
            until = journal.now() + project.respond.approval_days * DAY_S
            with suppress(ResponseError):  # dismissed in this moment
                journal.tell(Kind.WAITING, number, reason=str(error), until=until)
        except Exception as error:  # noqa: BLE001 - whatever it is, the story tells it
            _log.exception("case %d has failed", number)
            journal.tell(Kind.FAILED, number, reason=f"{type(error).__name__}: {error}")


class _Work:
    """One attempt at a case."""

    def __init__(self, project: Project, journal: Journal, case: Case) -> None:
        self._project = _with_window(project, case)
        self._journal = journal
        self._case = case
        self._comparison = project.serving.comparison
        self._registry = project.registry()
        self._name = project.loaded_task.name

    def run(self) -> None:
        champion = self._registry.get(self._name, CHAMPION)
        judged = self._case.done.get(Kind.JUDGED)
        if judged is None:
            versions = {alarm["version"] for alarm in self._case.opening["alarms"]} - {""}
            if versions and str(champion.version) not in versions:
                self._is_overtaken(champion.version)
                return
            judged = self._judge(champion)
        if not judged["blessed"]:
            self._tell(Kind.REFUSED, version=judged["version"], gates=judged["refused"])
            return
        now = self._journal.case(self._case.number)
        if now.end is None and not now.awaited(self._project.respond):
            self._roll_out(judged)

    def _judge(self, champion: Version) -> dict[str, Any]:
        """Make a candidate, and note what the gates say of it."""
        make = self._federate if self._case.opening["action"] == "federate" else self._retrain
        found = make(champion)
        report = found.report
        refused = {gate.name: f"{gate.seen}; goal {gate.goal}" for gate in report.refused}
        judged = {
            "version": found.version,
            "blessed": report.blessed,
            "champion": champion.version,
            "metrics": dict(found.metrics),
            "against": [g.seen for g in report.gates if g.name.endswith("against champion")],
            "refused": refused,
        }
        self._tell(Kind.JUDGED, **judged)
        return judged

    def _roll_out(self, judged: Mapping[str, Any]) -> None:
        """Promote a version, after live traffic has spoken for it if that is wanted.

        Raises:
            ApprovalError: too few others approved it.
        """
        version = int(judged["version"])
        if self._is_promoted(version):  # an attempt before has done it, or a person
            self._promote(judged)
            return
        champion = self._registry.get(self._name, CHAMPION).version
        if champion != judged["champion"]:
            self._is_overtaken(champion)
            return
        self._registry.require_approved(self._name, version)
        # A champion that came without a word would be compared with the one that it repairs.
        if self._project.respond.rollout == "canary" or self._comparison.new_champions:
            story = self._canary(str(version))
            if story is None:
                return  # a person has ended the case
            if story.status is not Status.PASSED:
                self._tell(Kind.ROLLED_BACK, version=judged["version"], reason=story.reason)
                return
        self._promote(judged)

    def _canary(self, version: str) -> Story | None:
        """Ask the service for a canary and wait for its end; None if the case ends before."""
        book = RegistrySource(self._project.tracking_uri).book()
        name = f"case {self._case.opened_at:.3f}"
        expects = _expectation(self._case)
        plan = Plan(id=name, mode=Mode.CANARY, version=version, share=1.0, expects=expects)
        if Kind.CANARY not in self._case.done:
            book.plan(self._name, plan)
            self._tell(Kind.CANARY, version=int(version), plan=plan.id)
        while self._journal.case(self._case.number).end is None:
            asked, story = book.read(self._name)
            if story is not None and story.plan == plan.id and story.status is not Status.RUNNING:
                return story
            if asked is None or asked.id != plan.id:
                raise ServingError(f"somebody else compares versions of {self._name} now")
            time.sleep(_LOOK_AGAIN_S)
        book.plan(self._name, None)
        return None

    def _promote(self, judged: Mapping[str, Any]) -> None:
        version = int(judged["version"])
        if not self._is_promoted(version):
            pipeline.promote(self._project, version)
        state = _state_of(self._project)
        told = publish(self._project, state, version) if state else 0
        self._tell(Kind.PROMOTED, version=version, before=judged["champion"], devices_told=told)
        self._journal.forget_versions(but=version)

    def _is_overtaken(self, champion: int) -> None:
        self._tell(Kind.OVERTAKEN, champion=champion)
        self._journal.forget_versions(but=champion)

    def _is_promoted(self, version: int) -> bool:
        decisions = self._registry.decisions(self._name)
        return any(one.version == version and one.kind == "promoted" for one in decisions)

    # --- central ---

    def _retrain(self, champion: Version) -> Registered:
        params = params_of(self._registry, champion)
        if not is_network(params):
            return self._fit(params)
        weights = case_folder(self._project, self._case.number) / WEIGHTS
        trained = self._case.done.get(Kind.TRAINED)
        if trained is None:
            goes_on = self._project.respond.weights == "champion"
            parent = pipeline.parent_of(self._project, champion.version) if goes_on else None
            made = _when_free(lambda: pipeline.train_model(self._project, params, parent=parent))
            replace_file(weights, to_bytes(made.parameters))
            tags = {"minga.case": str(self._case.number)}
            self._project.tracker().log(made.run_id, tags=tags)
            trained = {"run_id": made.run_id, "source": redacted(self._project.source)}
            if parent is not None:
                trained["parent"] = parent.version
            self._tell(Kind.TRAINED, **trained)
        found = pipeline.find_registered(self._project, run_id=trained["run_id"])
        return found or pipeline.register_candidate(
            self._project,
            parameters=from_bytes(weights.read_bytes()),
            params=params,
            run_id=trained["run_id"],
            parent_version=trained.get("parent"),
        )

    def _fit(self, params: Mapping[str, Any]) -> Registered:
        """Fit what is no network; it takes seconds, so an attempt that died is done again."""
        known = self._case.done.get(Kind.TRAINED)
        found = pipeline.find_registered(self._project, run_id=known["run_id"]) if known else None
        if found is not None:
            return found
        made = _when_free(lambda: pipeline.train(self._project, params))
        self._tell(Kind.TRAINED, run_id=made.run_id, source=redacted(self._project.source))
        return pipeline.register_trained(self._project, made)

    # --- on devices ---

    def _federate(self, champion: Version) -> Registered:
        state = _state_of(self._project)
        assert state is not None, "the settings require it"

        async def rounds() -> tuple[pb.Campaign, Parameters]:
            async with connect(state) as operator:
                known = self._case.done.get(Kind.CAMPAIGN)
                name = known["campaign"] if known else await self._call(operator, champion)
                return await follow_campaign(operator, name, lambda _: None)

        return take_in(self._project, *asyncio.run(rounds()))

    async def _call(self, operator: Operator, champion: Version) -> str:
        """Start the case's campaign, or find the one that an attempt before has started."""
        called = self._case.done.get(Kind.CALLED)
        name = ""
        if called is not None:
            name = next((c.campaign_id for c in await _new(operator, called, self._name)), "")
        else:
            campaigns = (await operator.status()).campaigns
            self._tell(Kind.CALLED, known=[campaign.campaign_id for campaign in campaigns])
        if not name:
            await _until_none_runs(operator)
            name = await start(operator, self._project, self._registry)
        self._tell(Kind.CAMPAIGN, campaign=name, parent=champion.version)
        return name

    def _tell(self, kind: Kind, **detail: Any) -> None:
        self._journal.tell(kind, self._case.number, **detail)


def _expectation(case: Case) -> Expectation:
    """Say what the predictions of what a case made are to look like on live traffic."""
    is_only_old = all(alarm["name"] == STALE for alarm in case.opening["alarms"])
    if case.opening["action"] == "federate" and not is_only_old:
        return Expectation.ANY  # devices learned from their new data; it was tested on the centre's
    return Expectation.REPAIR


def _with_window(project: Project, case: Case) -> Project:
    """Let the project's data be the new window."""
    source = project.respond.source
    if not source or case.opening["action"] == "federate":
        return project
    times = {
        "{since}": min(alarm["since"] for alarm in case.opening["alarms"]),
        "{until}": case.opened_at,
    }
    for word, moment in times.items():
        source = source.replace(word, datetime.fromtimestamp(moment, UTC).strftime("%FT%TZ"))
    data = project.data.model_copy(update={"source": source, "sha256": ""})
    changed = project.model_copy(update={"data": data})
    changed._directory = project.directory
    return changed


def _state_of(project: Project) -> Path | None:
    state = project.respond.coordinator
    return project.directory / state if state else None


async def _new(operator: Operator, called: Any, model: str) -> list[pb.Campaign]:
    """Give the campaigns of a model that were not there when one was called for."""
    campaigns = (await operator.status()).campaigns
    return [
        campaign
        for campaign in campaigns
        if campaign.campaign_id not in called["known"] and campaign.plan.model_name == model
    ]


async def _until_none_runs(operator: Operator) -> None:
    """Wait until the coordinator is free: it runs one campaign at a time."""
    for campaign in (await operator.status()).campaigns:
        if campaign.state == pb.CAMPAIGN_STATE_RUNNING:
            async for _ in operator.watch(campaign.campaign_id):
                pass


def _when_free(call: Callable[[], T]) -> T:
    """Wait for whoever else searches or trains in the project, then call."""
    while True:
        try:
            return call()
        except BusyError as error:
            _log.info("%s", error)
            time.sleep(_BUSY_PAUSE_S)


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Wait until no other process works on the case; ends with this process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Do the work of the case that the command line names."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    project = load(Path(sys.argv[1]))
    journal = open_journal(project)
    try:
        work(project, journal, int(sys.argv[2]))
    except _PASSING as error:
        _log.warning("this attempt ends: %s", error)
        sys.exit(1)
    finally:
        journal.close()


if __name__ == "__main__":
    main()
