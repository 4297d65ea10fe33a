"""Registered model versions: their files, their digests, and which of them is champion.

A version's files are never changed. What it carries is in `minga.training.bundle`. The tag
`minga.blessed` tells listings what its gates said; promotion believes the signed verdict alone.
The aliases `champion` and `challenger` say which is used; how the first moves is in
`minga.training.promotions`, and who may follow whom in `minga.training.succession`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow.exceptions import MlflowException
from mlflow.utils import get_results_from_paginated_fn

from minga.inference.uris import local_path
from minga.training.approvals import (
    Approval,
    Approvals,
    Policy,
    read_approvals,
    require_approvals,
    sign_approval,
)
from minga.training.bundle import MODEL, Digests, read_authors, read_verdict
from minga.training.errors import GateError, RegistryError
from minga.training.progress import OnProgress, silent
from minga.training.promotions import SUFFIX, Decision, Kind, Ledger, who_and_when
from minga.training.services import Service, services_of
from minga.training.signing import Keyring
from minga.training.succession import last_promotion, require_current, require_same_files
from minga.training.tracking import connect

Alias = Literal["champion", "challenger"]

CHAMPION: Alias = "champion"
CHALLENGER: Alias = "challenger"

ARTIFACT_PATH = "bundle"
"""Where in its run's artifacts a version's files are."""

_PAGE = 1000
"""Models that MLflow is asked for at a time; 1000 is its most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One registered version, as the registry tells it."""

    name: str
    version: int
    run_id: str
    blessed: bool
    aliases: tuple[str, ...]
    created_at_ms: int
    digests: Digests
    tags: dict[str, str]


class Registry:
    """Model versions in one MLflow database.

    Several processes may read, register and promote at once; of two that promote at once, one
    wins and the other is told.

    Args:
        tracking_uri: of MLflow, such as `sqlite:////path/mlflow.db`.
        on_progress: hears of the seconds that making a database takes.
        keyring: opens the keys whose verdicts and promotions are believed; only promotions and
            their history need them.
        approvals: how many approvals by others a promotion needs.
    """

    def __init__(
        self,
        tracking_uri: str,
        on_progress: OnProgress = silent,
        *,
        keyring: Callable[[], Keyring] | None = None,
        approvals: Policy | None = None,
    ) -> None:
        self._client = connect(tracking_uri, on_progress)
        self._keyring = keyring
        self._policy = approvals or Policy()

    def names(self) -> tuple[str, ...]:
        """Name all registered models."""
        models = get_results_from_paginated_fn(
            lambda most, token: self._client.search_registered_models(
                max_results=most, page_token=token
            ),
            _PAGE,
        )
        return tuple(sorted(model.name for model in models if not model.name.endswith(SUFFIX)))

    def only_name(self, name: str = "") -> str:
        """Give the model that is meant: the one that is named, or the only one there is.

        Raises:
            RegistryError: no name is given, and there is none, or there are several.
        """
        names = (name,) if name else self.names()
        if not names:
            raise RegistryError("no model is registered yet; make one with: minga run")
        if len(names) > 1:
            raise RegistryError(f"there are several models, {', '.join(names)}: name one")
        return names[0]

    def register(
        self, name: str, bundle: Path, *, run_id: str, blessed: bool, tags: dict[str, str]
    ) -> Version:
        """Store a bundle with its run and make it a version.

        Args:
            name: of the model; it is made if it is new.
            bundle: the folder; it may be deleted afterwards.
            run_id: the run that the version belongs to.
            blessed: whether it passed its gates.
            tags: more facts about it.

        Raises:
            RegistryError: the run has a version already, whose files this one's would overwrite.
        """
        digests = Digests.of(bundle)
        self._require_free(run_id)
        self._client.log_artifacts(run_id, str(bundle), ARTIFACT_PATH)
        if name not in self.names():
            self._client.create_registered_model(name)
        source = self._place(run_id)
        made = self._client.create_model_version(
            name,
            source,
            run_id,
            tags={
                "minga.blessed": str(blessed).lower(),
                "minga.onnx_sha256": digests.onnx,
                "minga.weights_sha256": digests.weights,
                "minga.bundle_sha256": digests.bundle,
                **tags,
            },
        )
        return self.get(name, int(made.version))

    def stage(self, run_id: str, onnx: bytes) -> Path:
        """Store a model where its version's files will lie, before there is the version.

        Args:
            run_id: the run that the version will belong to.
            onnx: the model.

        Returns:
            the file as the store gives it to whoever loads the version; only read it.

        Raises:
            RegistryError: the run has a version already, whose files this one's would overwrite.
        """
        self._require_free(run_id)
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / MODEL
            file.write_bytes(onnx)
            self._client.log_artifact(run_id, str(file), ARTIFACT_PATH)
        return self._fetched(self._place(run_id), run_id) / MODEL

    def list_versions(self, name: str) -> tuple[Version, ...]:
        """Give all versions of a model, the newest first."""
        model = self._registered(name)
        found = self._client.search_model_versions(f"name='{name}'", max_results=10_000)
        versions = (_version(item, model.aliases) for item in found)
        return tuple(sorted(versions, key=lambda version: version.version, reverse=True))

    def get(self, name: str, which: int | str) -> Version:
        """Give one version, by number or alias.

        Raises:
            RegistryError: there is none.
        """
        model = self._registered(name)
        number = _number(which, model.aliases)
        if number is None:
            known = ", ".join(sorted(model.aliases)) or "none yet"
            raise RegistryError(
                f"{name} has no version called {which!r}; aliases: {known}; "
                "see all with: minga model list"
            )
        try:
            return _version(self._client.get_model_version(name, str(number)), model.aliases)
        except MlflowException as error:
            raise RegistryError(
                f"{name} has no version {number}; see all with: minga model list"
            ) from error

    def find(self, name: str, which: int | str) -> Version | None:
        """Give one version, or None if the model or the version does not exist."""
        if name not in self.names():
            return None
        try:
            return self.get(name, which)
        except RegistryError:
            return None

    def find_run(self, name: str, which: str) -> Version:
        """Give the version of a run, or the one that a number or an alias names.

        Raises:
            RegistryError: there is none.
        """
        found = self._client.search_model_versions(f"run_id='{which}'") if len(which) == 32 else ()
        for version in found:
            if version.name == name:
                return self.get(name, int(version.version))
        return self.get(name, which)

    def fetch(self, name: str, which: int | str) -> Path:
        """Bring a version's files to this machine and check them against what was registered.

        Returns:
            the folder; it is the registry's own if that is on this machine, so only read it.

        Raises:
            RegistryError: there is no such version, or its files are not what was registered.
        """
        version = self.get(name, which)
        folder = self._folder(version)
        if not folder.is_dir():
            raise RegistryError(f"{name} version {version.version}: its files are gone: {folder}")
        seen = Digests.of(folder, needs_weights=bool(version.digests.weights))
        if seen != version.digests:
            raise RegistryError(
                f"{name} version {version.version} was changed after it was registered: "
                f"sha256 {seen.bundle[:12]}, registered {version.digests.bundle[:12]}; "
                "do not use it, register it anew"
            )
        return folder

    def set_alias(self, name: str, alias: Alias, version: int) -> None:
        """Let an alias name a version, and no other one."""
        self._client.set_registered_model_alias(name, alias, str(version))

    def promote(self, name: str, which: int | str, *, override: str = "") -> Version:
        """Make a version the champion.

        A version that was judged against a champion takes the place of that one and no other: if
        somebody else promoted in the meantime, this promotion fails. A version that was champion
        before may come back at any time.

        Args:
            name: of the model.
            which: number or alias.
            override: why it is promoted although its gates refused it or it was not judged
                against today's champion; the reason is kept in the ledger.

        No `override` stands for the approvals of others, nor does having been champion before.

        Raises:
            GateError: its gates refused it, and there is no `override`.
            ApprovalError: too few others approved it.
            ConflictError: the champion is not the one that it was judged against, or changes now.
            VerdictError: its verdict, or the ledger, is altered or not by a trusted key.
            RegistryError: there is no such version, or its files are not what was registered.
        """
        version = self.get(name, which)
        folder = self.fetch(name, version.version)
        report = read_verdict(folder, name, self._keys())
        if not report.blessed and not override:
            raise GateError(
                f"{name} version {version.version} did not pass its gates and stays a candidate; "
                f"see why with: minga model show {version.version}"
            )
        approved = self._approvals(version, folder)
        require_approvals(approved, self._policy, model=name, version=version.version)
        ledger = Ledger(self._client, name, self._keys())
        seen, history = ledger.entries(), ledger.decisions()
        require_same_files(version, history)
        champion = self._champion(name, history)
        if not override:
            require_current(version, report.champion, champion, history)
        decision = self._decision(version, champion, "promoted", override, approved.people)
        ledger.append(seen, decision, source=self._source(version), run_id=version.run_id)
        self._settle(name, ledger)
        if override:
            self._tag(version, "minga.overridden", "true")
        if CHALLENGER in version.aliases:
            self._client.delete_registered_model_alias(name, CHALLENGER)
        return self.get(name, version.version)

    def approve(self, name: str, which: int | str, *, comment: str = "") -> Approvals:
        """Approve a version with this machine's key.

        Args:
            name: of the model.
            which: number or alias.
            comment: is kept with the approval.

        Returns:
            all approvals of the version.

        Raises:
            ApprovalError: this key registered or judged the version, or may not approve.
            VerdictError: its verdict is altered or not by a trusted key.
            RegistryError: there is no such version, or its files are not what was registered.
        """
        version = self.get(name, which)
        folder = self.fetch(name, version.version)
        read_verdict(folder, name, self._keys())
        by, at = who_and_when()
        approval = Approval(
            model=name,
            version=version.version,
            bundle_sha256=version.digests.bundle,
            by=by,
            at=at,
            comment=comment,
        )
        authors = read_authors(folder, self._keys())
        self._tag(version, *sign_approval(self._keys(), self._policy, approval, authors))
        return self._approvals(self.get(name, version.version), folder)

    def approvals(self, name: str, which: int | str) -> Approvals:
        """Tell who approved a version, and whose approval does not count.

        Raises:
            VerdictError: its verdict is altered or not by a trusted key.
            RegistryError: there is no such version, or its files are not what was registered.
        """
        version = self.get(name, which)
        folder = self.fetch(name, version.version)
        read_verdict(folder, name, self._keys())
        return self._approvals(version, folder)

    def require_approved(self, name: str, version: int) -> Approvals:
        """Give the approvals of a version that may be promoted as far as other people go.

        Raises:
            ApprovalError: too few others approved it; and what `approvals` raises.
        """
        found = self.approvals(name, version)
        require_approvals(found, self._policy, model=name, version=version)
        return found

    def retire(self, name: str, which: int | str, *, reason: str) -> Version:
        """Take a version out of use: it is promoted no more, unless somebody overrides that.

        Its files stay, for whoever asks later what was served.

        Args:
            name: of the model.
            which: number or alias.
            reason: is kept in the ledger.

        Raises:
            GateError: it is the champion.
            ConflictError: somebody else decided something in the same moment.
            VerdictError: the ledger is altered or not by trusted keys.
            RegistryError: there is no such version.
        """
        version = self.get(name, which)
        ledger = Ledger(self._client, name, self._keys())
        seen, history = ledger.entries(), ledger.decisions()
        champion = self._champion(name, history)
        if champion == version.version:
            raise GateError(
                f"{name} version {version.version} is champion and cannot be retired; promote "
                "another one first"
            )
        decision = self._decision(version, champion, "retired", reason)
        ledger.append(seen, decision, source=self._source(version), run_id=version.run_id)
        if CHALLENGER in version.aliases:
            self._client.delete_registered_model_alias(name, CHALLENGER)
        return self.get(name, version.version)

    def services(self, name: str = "") -> tuple[Service, ...]:
        """Tell which version was served centrally where and when, the oldest first."""
        return services_of(self._client, name)

    def decisions(self, name: str) -> tuple[Decision, ...]:
        """Tell which versions were promoted and retired, by whom and why, the oldest first.

        Raises:
            VerdictError: an entry is altered, missing, or signed by nobody who is trusted.
        """
        return Ledger(self._client, name, self._keys()).decisions()

    def _approvals(self, version: Version, folder: Path) -> Approvals:
        return read_approvals(
            self._keys(),
            self._policy,
            version.tags,
            model=version.name,
            version=version.version,
            bundle_sha256=version.digests.bundle,
            authors=read_authors(folder, self._keys()),
        )

    def _champion(self, name: str, history: tuple[Decision, ...]) -> int | None:
        """Give the champion: whom the alias names, or will name as soon as a promotion is done."""
        current = self.find(name, CHAMPION)
        number = current.version if current else None
        last = last_promotion(history)
        if last is not None and number == last.champion_before:
            return last.version
        return number

    def _settle(self, name: str, ledger: Ledger) -> None:
        """Let the alias name what was promoted last.

        Between an entry and its alias another process may have made both: looking again after
        the alias was set leaves the last word to the ledger, whoever writes last.
        """
        settled = 0
        while (last := last_promotion(ledger.decisions())) and last.number != settled:
            self.set_alias(name, CHAMPION, last.version)
            settled = last.number

    def _decision(
        self,
        version: Version,
        champion: int | None,
        kind: Kind,
        reason: str,
        approved_by: tuple[str, ...] = (),
    ) -> Decision:
        by, at = who_and_when()
        return Decision(
            number=0,
            previous="",
            model=version.name,
            version=version.version,
            bundle_sha256=version.digests.bundle,
            champion_before=champion,
            kind=kind,
            by=by,
            at=at,
            reason=reason,
            approved_by=approved_by,
        )

    def _folder(self, version: Version) -> Path:
        """Give where a version's files are on this machine, unchecked."""
        return self._fetched(self._source(version), version.run_id)

    def _fetched(self, source: str, run_id: str) -> Path:
        folder = local_path(source)
        return folder or Path(self._client.download_artifacts(run_id, ARTIFACT_PATH))

    def _place(self, run_id: str) -> str:
        """Give the URI of the folder that the files of a run's version are in."""
        return f"{self._client.get_run(run_id).info.artifact_uri}/{ARTIFACT_PATH}"

    def _require_free(self, run_id: str) -> None:
        if taken := self._client.search_model_versions(f"run_id='{run_id}'"):
            raise RegistryError(
                f"run {run_id} has version {taken[0].version} of {taken[0].name} already, and "
                "versions never change; open another run"
            )

    def _tag(self, version: Version, key: str, value: str) -> None:
        self._client.set_model_version_tag(version.name, str(version.version), key, value)

    def _source(self, version: Version) -> str:
        return str(self._client.get_model_version(version.name, str(version.version)).source)

    def _keys(self) -> Keyring:
        assert self._keyring is not None, "a registry that promotes is opened with a keyring"
        return self._keyring()

    def _registered(self, name: str) -> Any:
        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            known = ", ".join(self.names()) or "none yet; make one with: minga run"
            raise RegistryError(f"no model {name!r} is registered; models: {known}") from error


def _number(which: int | str, aliases: dict[str, str]) -> int | None:
    if isinstance(which, int) or which.isdecimal():
        return int(which)
    found = aliases.get(which)
    return None if found is None else int(found)


def _version(item: Any, aliases: dict[str, str]) -> Version:
    tags = dict(item.tags)
    return Version(
        name=item.name,
        version=int(item.version),
        run_id=item.run_id or "",
        blessed=tags.get("minga.blessed") == "true",
        aliases=tuple(
            sorted(alias for alias, number in aliases.items() if int(number) == int(item.version))
        ),
        created_at_ms=int(item.creation_timestamp),
        digests=Digests(
            onnx=tags.get("minga.onnx_sha256", ""),
            weights=tags.get("minga.weights_sha256", ""),
            bundle=tags.get("minga.bundle_sha256", ""),
        ),
        tags=tags,
    )
