"""One place on Ray where the series of all replicas come together; see `totals`.

Each replica tells the actor what it has counted, every second and before it ends, on a thread of
its own. A scrape of any replica tells once more and gets the whole back, so two scrapes that meet
two replicas never contradict each other. Nobody waits for a replica: of one that hangs or was
killed the last that it told counts, which is a second old at most.

The actor keeps the sums in memory alone. If it is lost with its machine, Ray starts another one,
and replicas give it back the sums that they heard last. Until it answers, a scrape is refused:
a gap does less harm than a counter that falls.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

import ray
from prometheus_client import CollectorRegistry, generate_latest
from ray.exceptions import GetTimeoutError, RayError

from minga.inference.errors import UnavailableError
from minga.serving.actors import shared_actor
from minga.serving.totals import Family, Given, Keepsake, Series, Totals, families_of

_NAME: Final = "metrics"
_EVERY_S: Final = 1.0
_TIMEOUT_S: Final = 5.0  # half of what Prometheus waits by default

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the actor says to a replica.

    Attributes:
        epoch: names the actor's life.
        sums: all sums; None if it has lost them and took nothing: tell again, with a keepsake.
        whole: all series, if they were asked for.
    """

    epoch: str
    sums: Mapping[str, Mapping[Series, float]] | None
    whole: Sequence[Family] = ()


class MetricsActor:
    """`Totals` in a process of its own."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._epoch = uuid4().hex

    def hear(
        self,
        replica: str,
        families: Sequence[Family],
        known: str | None = None,
        keepsake: Keepsake | None = None,
        *,
        wants_whole: bool = False,
    ) -> Answer:
        """Take what a replica tells, and tell it of the whole.

        Args:
            replica: names it.
            families: all that it has.
            known: the epoch that it heard of last, if it ever heard of one.
            keepsake: what it remembers of that epoch.
            wants_whole: whether it is to hear the series of all replicas.
        """
        now = time.monotonic()
        if known not in (None, self._epoch):
            if keepsake is None:
                return Answer(epoch=self._epoch, sums=None)
            self._totals.restore(replica, keepsake, now)
        self._totals.hear(replica, families, now)
        whole = self._totals.families(now) if wants_whole else ()
        return Answer(epoch=self._epoch, sums=self._totals.sums, whole=whole)

    def leave(self, replica: str) -> None:
        """Hear that a replica has ended."""
        self._totals.leave(replica)


class SharedMetrics:
    """A replica's part in the series of all.

    Args:
        replica: names it, and no other one.
        registry: where its own series live.
        every_s: how often it tells of them.
    """

    def __init__(
        self, replica: str, registry: CollectorRegistry, *, every_s: float = _EVERY_S
    ) -> None:
        self._replica = replica
        self._registry = registry
        self._every_s = every_s
        self._actor: Any = None
        self._epoch: str | None = None
        self._keepsake: Keepsake | None = None
        # What is told later must have been read later: a count that falls would begin anew.
        self._telling = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="minga-metrics", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def close(self) -> None:
        """Tell for the last time, and end; does nothing if never started."""
        if self._thread.ident is None:
            return
        self._stop.set()
        self._thread.join(2 * _TIMEOUT_S)
        try:
            self._tell()
            ray.get(self._actor.leave.remote(self._replica), timeout=_TIMEOUT_S)
        except (UnavailableError, RayError):
            _LOG.warning("what this replica counted in its last second is not told", exc_info=True)

    async def exposition(self) -> bytes:
        """Write the series of all replicas in Prometheus' text format.

        Raises:
            UnavailableError: they cannot be had now.
        """
        return await asyncio.to_thread(lambda: generate_latest(Given(self._tell(wants_whole=True))))

    def _run(self) -> None:
        is_complaining = False
        while not self._stop.wait(self._every_s):
            try:
                self._tell()
            except Exception as error:  # noqa: BLE001 - the next second may be better
                if not is_complaining:
                    _LOG.warning("metrics are not told: %s", error)
                is_complaining = True
            else:
                is_complaining = False

    def _tell(self, *, wants_whole: bool = False) -> Sequence[Family]:
        """Tell what is counted here, and hear of the whole."""
        if not self._telling.acquire(timeout=_TIMEOUT_S):
            raise UnavailableError("the metrics of all replicas cannot be had now; try again")
        try:
            families = families_of(self._registry)
            answer = self._ask(families, self._epoch, wants_whole=wants_whole)
            if answer.sums is None:
                answer = self._ask(families, self._epoch, self._keepsake, wants_whole=wants_whole)
            assert answer.sums is not None, "it has a keepsake now"
            self._epoch = answer.epoch
            self._keepsake = Keepsake(sums=answer.sums, told=families)
            return answer.whole
        except GetTimeoutError as error:
            raise UnavailableError("the metrics' actor does not answer in time") from error
        except RayError as error:
            self._actor = None
            raise UnavailableError(f"the metrics' actor does not answer: {error}") from error
        finally:
            self._telling.release()

    def _ask(self, *arguments: Any, wants_whole: bool) -> Answer:
        if self._actor is None:
            self._actor = shared_actor(MetricsActor, _NAME)
        heard = self._actor.hear.remote(self._replica, *arguments, wants_whole=wants_whole)
        answer: Answer = ray.get(heard, timeout=_TIMEOUT_S)
        return answer
