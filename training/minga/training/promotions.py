"""The ledger of promotions: who made which version champion or retired it, when, and why.

MLflow keeps no history of an alias and moves it for whoever asks last. So each decision is first
an entry of a ledger, and only then moves an alias. The ledger is itself a registered model,
`<model>.promotions`, one version an entry: MLflow numbers versions one after the other whatever
backend it has, so that number is what two promotions at once compete for. An entry says which
number it means to be; one that got another number came too late and is void.

Each entry is signed and names the digest of the entry before it, so one that was altered, left
out or put in between is noticed. Entries cut off at the end are not.
"""

import getpass
import hashlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from mlflow.exceptions import MlflowException

from minga.training.document import Document
from minga.training.errors import ConflictError, VerdictError
from minga.training.signing import Keyring

SUFFIX = ".promotions"
"""No Task's name has a dot, so no model is called so."""

Kind = Literal["promoted", "retired"]

KIND = "application/vnd.minga.promotion+json"

_TAG = "minga.promotion"
_ATTEMPTS = 5


class Decision(Document):
    """What an entry of the ledger says."""

    number: int
    """Which entry it means to be, from 1."""
    previous: str
    """SHA-256 of the envelope of the entry before; empty for the first."""
    model: str
    version: int
    bundle_sha256: str
    champion_before: int | None
    kind: Kind = "promoted"
    by: str
    """User and machine, as that machine says."""
    at: str
    reason: str = ""
    """Why it was retired, or promoted although something spoke against it; else empty."""
    approved_by: tuple[str, ...] = ()
    """Who else had approved it, with the names of their keys."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as the registry has it.

    Attributes:
        number: which one it became.
        envelope: the signed statement.
    """

    number: int
    envelope: str

    def read(self, keyring: Keyring) -> Decision:
        """Check the signature and give what was signed.

        Raises:
            VerdictError: no trusted key signed it.
        """
        return Decision.model_validate_json(keyring.open_envelope(KIND, self.envelope))


class Ledger:
    """The decisions over one model's versions."""

    def __init__(self, client: Any, model: str, keyring: Keyring) -> None:
        self._client = client
        self._model = model
        self._keyring = keyring

    def entries(self) -> tuple[Entry, ...]:
        """Give all entries, the oldest first."""
        name = self._model + SUFFIX
        found = self._client.search_model_versions(f"name='{name}'", max_results=10_000)
        entries = (Entry(int(one.version), one.tags.get(_TAG, "")) for one in found)
        return tuple(sorted(entries, key=lambda entry: entry.number))

    def decisions(self) -> tuple[Decision, ...]:
        """Give what happened, the oldest first; what came too late is left out.

        Raises:
            VerdictError: an entry is altered, missing, or signed by nobody who is trusted.
        """
        return tuple(self._read(self.entries()))

    def append(
        self, after: Iterable[Entry], decision: Decision, *, source: str, run_id: str
    ) -> None:
        """Add an entry after those that were seen.

        Args:
            after: all entries as they were when it was decided.
            decision: what is promoted or retired; number and previous entry are filled in.
            source: where the version's files are, which MLflow wants to know.
            run_id: of the version.

        Raises:
            ConflictError: somebody else added one in the meantime.
        """
        seen = tuple(after)
        last = seen[-1] if seen else Entry(0, "")
        entry = decision.model_copy(
            update={"number": last.number + 1, "previous": _digest(last.envelope)}
        )
        envelope = self._keyring.sign(KIND, entry.model_dump_json().encode())
        number = self._add(envelope, source, run_id)
        if number != entry.number:
            winner = next((p for p in self.decisions() if p.number == entry.number), None)
            what = f"version {winner.version} was {winner.kind} by {winner.by}" if winner else "it"
            raise ConflictError(
                f"{self._model} version {entry.version} was not {entry.kind}: {what} in the same "
                "moment; look at it with: minga model history"
            )

    def _read(self, entries: tuple[Entry, ...]) -> Iterable[Decision]:
        before = Entry(0, "")
        for entry in entries:
            decision = entry.read(self._keyring)
            if entry.number != before.number + 1:
                raise VerdictError(
                    f"entry {before.number + 1} of {self._model}'s ledger of promotions is missing"
                )
            if decision.number == entry.number:
                if decision.previous != _digest(before.envelope):
                    raise VerdictError(
                        f"entry {before.number} of {self._model}'s ledger of promotions is not "
                        "the one that was there before: it was exchanged"
                    )
                if decision.model != self._model:
                    raise VerdictError(
                        f"entry {entry.number} of {self._model}'s ledger of promotions is of "
                        f"{decision.model}"
                    )
                yield decision
            before = entry

    def _add(self, envelope: str, source: str, run_id: str) -> int:
        """Store an entry and give its number. Many at once make MLflow give up: ask again."""
        name = self._model + SUFFIX
        for attempt in range(_ATTEMPTS):
            try:
                if not self.entries():
                    self._open(name)
                made = self._client.create_model_version(
                    name, source, run_id, tags={_TAG: envelope}
                )
                return int(made.version)
            except MlflowException:
                if attempt == _ATTEMPTS - 1:
                    raise
        raise AssertionError

    def _open(self, name: str) -> None:
        """Make the ledger, unless another process just did."""
        try:
            self._client.create_registered_model(
                name, description="Minga's ledger of promotions; not a model, do not change it"
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def who_and_when() -> tuple[str, str]:
    """Give who runs this process, and the time."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}", datetime.now(UTC).isoformat(timespec="seconds")


def _digest(envelope: str) -> str:
    return hashlib.sha256(envelope.encode()).hexdigest() if envelope else ""
