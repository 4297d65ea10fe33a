"""The record of which version was served where and when, kept in MLflow beside the registry.

Each period in which one place serves one version is a run of the experiment `minga-serving`: it
starts and ends with the period, and its tags name model, version, digest and place. While it lasts
the tag `minga.seen_at` is renewed each minute; a host that died leaves its run open, and the tag
says until when it was surely alive. `minga.training.services` reads it.

A registry that is away must not stop serving: what cannot be written now is written later.
"""

import logging
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, Final
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from minga.inference.engine import ModelRef
from minga.inference.uris import scrubbed

EXPERIMENT: Final = "minga-serving"
SEEN_EVERY_S: Final = 60.0

_LOG: Final = logging.getLogger(__name__)
_ERRORS: Final = (MlflowException, SQLAlchemyError, OSError)


def _client(tracking_uri: str) -> Any:
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


class ServiceRecord:
    """Writes down what one place serves.

    Args:
        tracking_uri: of MLflow.
        url: where the place listens; host name of this machine and port name the place.
        clock: seconds since 1970.
        connect: from the tracking URI to MLflow's client.
    """

    def __init__(
        self,
        tracking_uri: str,
        url: str,
        *,
        clock: Callable[[], float] = time.time,
        connect: Callable[[str], Any] = _client,
    ) -> None:
        self._uri = tracking_uri
        self._client_of = connect
        self._place = f"{socket.gethostname()}:{urlsplit(url).port}"
        self._clock = clock
        self._client: Any = None
        self._experiment = ""
        self._open: dict[ModelRef, str] = {}
        self._wanted: tuple[ModelRef, ...] = ()
        self._seen_at = 0.0
        self._is_complaining = False

    def note(self, refs: Iterable[ModelRef]) -> None:
        """Tell which versions are served now; cheap when nothing has changed."""
        self._wanted = tuple(refs)
        is_due = self._clock() - self._seen_at >= SEEN_EVERY_S
        if set(self._wanted) != self._open.keys() or is_due:
            self._try(self._update)

    def close(self) -> None:
        """Tell that nothing is served here any more."""
        self._wanted = ()
        self._try(self._update)

    def _update(self) -> None:
        if self._client is None:
            self._connect()
        now = self._clock()
        for ref in self._open.keys() - set(self._wanted):
            self._end(self._open[ref], "FINISHED", now)
            del self._open[ref]
        for ref in self._wanted:
            if ref not in self._open:
                self._open[ref] = self._begin(ref, now)
        for run_id in self._open.values():
            self._client.set_tag(run_id, "minga.seen_at", str(int(now * 1000)))
        self._seen_at = now

    def _connect(self) -> None:
        """Open the experiment, and end what this place left open when it died."""
        client = self._client_of(self._uri)
        found = client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                self._experiment = client.create_experiment(EXPERIMENT)
            except MlflowException:  # another host made it just now
                self._experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
        else:
            self._experiment = found.experiment_id
        left = client.search_runs(
            [self._experiment],
            f"attributes.status = 'RUNNING' and tags.`minga.place` = '{self._place}'",
        )
        self._client = client
        for run in left:
            seen_at = int(run.data.tags.get("minga.seen_at", run.info.start_time)) / 1000
            self._end(run.info.run_id, "KILLED", seen_at)

    def _begin(self, ref: ModelRef, now: float) -> str:
        tags = {
            "minga.step": "serve",
            "minga.model": ref.name,
            "minga.version": ref.version,
            "minga.onnx_sha256": ref.sha256,
            "minga.place": self._place,
        }
        name = f"{ref.name} {ref.version} at {self._place}"
        run = self._client.create_run(
            self._experiment, start_time=int(now * 1000), run_name=name, tags=tags
        )
        return str(run.info.run_id)

    def _end(self, run_id: str, status: str, at: float) -> None:
        self._client.set_terminated(run_id, status, end_time=int(at * 1000))

    def _try(self, write: Callable[[], None]) -> None:
        """Write, or say once that it does not work and leave it for the next time."""
        try:
            write()
        except _ERRORS as error:
            if not self._is_complaining:
                reason = scrubbed(str(error), self._uri)
                _LOG.warning("the record of what is served cannot be written: %s", reason)
            self._is_complaining = True
        else:
            self._is_complaining = False
