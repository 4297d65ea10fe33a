"""The service of `minga respond run`: listens, decides, and runs the work of the open case."""

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, closing
from pathlib import Path

from minga.cluster.occupation import held
from minga.cluster.project import Project
from minga.cluster.response.alarms import Alarm, read_log
from minga.cluster.response.journal import Journal
from minga.cluster.response.metrics import Metrics
from minga.cluster.response.policy import (
    MAX_ATTEMPTS,
    STALE,
    Hold,
    Kind,
    Open,
    decide,
    is_ours,
)
from minga.cluster.response.receiver import Receiver, token_of
from minga.inference.monitor.alarms import AlarmLog
from minga.inference.server import Server

_log = logging.getLogger(__name__)

JOURNAL_FILE = "journal.db"
STOP_GRACE_S = 30.0
_TICK_S = 0.5
LOOK_S = 30.0
"""How often the registry is asked for stale champions and for approvals."""

_PAUSE_S = 10.0
"""Between two attempts at the work of a case."""


def folder_of(project: Project) -> Path:
    """Where a project keeps its journal, the webhook's token, and the files of cases."""
    return project.work_folder / "respond"


def open_journal(project: Project, *, clock: Callable[[], float] = time.time) -> Journal:
    """Open a project's journal."""
    return Journal(folder_of(project) / JOURNAL_FILE, clock=clock)


class Responder:
    """Decides what alarms lead to and runs it, until cancelled.

    Args:
        project: whose `[respond]` table counts.
        journal: is read again at each tick, since people and the work write into it too.
        clock: seconds since 1970.
    """

    def __init__(
        self, project: Project, journal: Journal, *, clock: Callable[[], float] = time.time
    ) -> None:
        self.metrics = Metrics()
        self._project = project
        self._config = project.respond
        self._model = project.loaded_task.name
        self._journal = journal
        self._clock = clock
        self._child: asyncio.subprocess.Process | None = None
        self._not_before = 0.0
        self._look_after = 0.0

    async def hear(self, alarms: tuple[Alarm, ...]) -> int:
        """Take alarms in; those that may not act are not kept. Gives how many may."""
        ours = tuple(alarm for alarm in alarms if is_ours(alarm, self._model, self._config))
        if ours:
            self._journal.hear(ours)
        return len(ours)

    async def run(self) -> None:
        """Decide and work until cancelled; the work then goes on at the next start."""
        try:
            while True:
                await self.tick()
                await asyncio.sleep(_TICK_S)
        finally:
            await self._stop_child()

    async def tick(self) -> None:
        """Look at everything once."""
        self._read_monitor()
        now = self._clock()
        if now >= self._look_after:
            self._look_after = now + LOOK_S
            try:
                await asyncio.to_thread(self._look_at_registry, now)
            except Exception as error:  # noqa: BLE001 - it is asked again; alarms must go on
                _log.warning("the registry cannot be asked: %s", error)
        cases, firing = self._journal.cases(), self._journal.firing()
        self.metrics.observe(len(firing), cases, self._config, now)
        decision = decide(firing, cases, self._config, now)
        if isinstance(decision, Open):
            number = self._journal.open_case(tuple(decision.alarms), self._config.action)
            names = ", ".join(sorted({alarm.name for alarm in decision.alarms}))
            _log.info("case %d is opened: %s", number, names)
            cases = self._journal.cases()
        elif isinstance(decision, Hold):
            self._journal.hold(decision.reason, decision.until)
        if cases and cases[-1].end is None:
            await self._go_on(cases[-1].number, now)
        elif cases and cases[-1].end is Kind.DISMISSED:
            await self._stop_child()

    def _read_monitor(self) -> None:
        """Take in what the monitor of this project's servers has noticed."""
        folder = self._project.monitor_folder
        known = self._journal.read_to(folder)
        alarms, last = read_log(AlarmLog(folder), self._model, known)
        if last != known:
            ours = tuple(alarm for alarm in alarms if is_ours(alarm, self._model, self._config))
            self._journal.hear(ours, read_to=(folder, last))

    def _look_at_registry(self, now: float) -> None:
        """See whether the champion is stale, and whether people agreed to what waits for them."""
        if not self._project.has_registry:
            return
        # SQLite's connections stay in their thread.
        with closing(open_journal(self._project, clock=self._clock)) as journal:
            cases = journal.cases()
            is_open = bool(cases) and cases[-1].end is None
            if is_open and Kind.WAITING in cases[-1].done:
                from minga.cluster.response.looking import see_agreement  # noqa: PLC0415 - MLflow

                see_agreement(self._project, journal, cases[-1], now)
            elif not is_open and STALE in self._config.alarms:
                from minga.cluster.response.looking import see_age  # noqa: PLC0415 - MLflow

                see_age(self._project, journal, cases, now)

    async def _go_on(self, number: int, now: float) -> None:
        """See to it that the work of the open case runs, unless a person is waited for."""
        child = self._child
        if child is not None and child.returncode is None:
            return
        if child is not None:
            self._child = None
            _log.info("the work of case %d ended with %s", number, child.returncode)
            self._not_before = now + (_PAUSE_S if child.returncode else 0)
            return
        case = self._journal.case(number)
        if case.end is not None or case.awaited(self._config) or now < self._not_before:
            return
        if case.attempts >= MAX_ATTEMPTS:
            reason = f"its work ended {MAX_ATTEMPTS} times without a result; see its log.txt"
            self._journal.tell(Kind.FAILED, number, reason=reason)
            return
        self._child = await self._start(number)

    async def _start(self, number: int) -> asyncio.subprocess.Process:
        log = case_folder(self._project, number) / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "minga.cluster.response.work"),
                *(str(self._project.directory), str(number)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C is for the responder, which ends its work.
                start_new_session=True,
            )

    async def _stop_child(self) -> None:
        child = self._child
        if child is None or child.returncode is not None:
            return
        child.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_GRACE_S):
                await child.wait()
        except TimeoutError:
            child.kill()
            await child.wait()


def case_folder(project: Project, number: int) -> Path:
    """Where the files of a case are: its log, the weights that it trained."""
    return folder_of(project) / "cases" / str(number)


async def respond(project: Project, on_ready: Callable[[str], None]) -> None:
    """Receive alarms and let them act until cancelled.

    Args:
        project: whose `[respond]` table counts.
        on_ready: hears the webhook's URL once messages are taken.

    Raises:
        BusyError: another process responds for this project.
        PortInUseError: the port is taken.
        ResponseError: the journal cannot be used.
    """
    folder, config = folder_of(project), project.respond

    def taken(holder: str) -> str:
        return f"the responder of {project.directory} is process {holder}; there is one"

    async with AsyncExitStack() as stack:
        stack.enter_context(held(folder / "lock", taken))
        journal = open_journal(project)
        stack.callback(journal.close)
        responder = Responder(project, journal)
        receiver = Receiver(token_of(folder), responder.hear, responder.metrics)
        server = Server(receiver, host=config.host, port=config.port)
        await stack.enter_async_context(server)
        on_ready(f"{server.url}/alerts")
        await responder.run()
