"""Lineage, services and ageing over everything that a project can see: registry and fleet."""

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from minga.cluster.project import Project
from minga.federation.audit import Entry
from minga.federation.coordinator.audit_log import Kind, read_log
from minga.federation.coordinator.store import DATABASE_FILE
from minga.inference.monitor.alarms import DATABASE_FILE as MONITOR_FILE
from minga.inference.monitor.alarms import AlarmLog
from minga.inference.monitor.judgement import AlarmKind
from minga.inference.monitor.store import Store
from minga.training.ageing import Finding, Limits, Wear, find_stale
from minga.training.ancestry import Ancestry, build_ancestry
from minga.training.bundle import LINEAGE
from minga.training.errors import RegistryError
from minga.training.lineage import Lineage
from minga.training.registry import Registry, Version
from minga.training.services import Service
from minga.training.succession import retired


def services_everywhere(
    project: Project, name: str = "", state: Path | None = None
) -> tuple[Service, ...]:
    """Tell which version was served where and when, the oldest first.

    Args:
        project: whose registry tells of servers.
        name: only of this model; all if empty.
        state: the coordinator's state folder or an export of its audit log; without it devices
            are left out.

    Raises:
        FederationError: there is no audit log.
    """
    central = project.registry().services(name) if project.has_registry else ()
    devices = tuple(device_services(state)) if state else ()
    found = (*central, *(one for one in devices if name in ("", one.model)))
    return tuple(sorted(found, key=lambda one: one.since))


def stale_everywhere(project: Project, state: Path | None = None) -> tuple[Finding, ...]:
    """Report what ages, of all models of the registry."""
    if not project.has_registry:
        return ()
    registry, services = project.registry(), services_everywhere(project, state=state)
    worn = wear_everywhere(project)
    return tuple(
        finding
        for name in registry.names()
        for finding in find_stale(
            registry.list_versions(name),
            [one for one in services if one.model == name],
            retired(registry.decisions(name)),
            now=datetime.now(UTC),
            limits=limits_of(project),
            wear={version: wear for (model, version), wear in worn.items() if model == name},
        )
    )


def limits_of(project: Project) -> Limits:
    """Say what a project calls stale."""
    return Limits(
        max_age=timedelta(days=project.gates.max_age_days), max_rows=project.gates.max_rows
    )


def wear_everywhere(project: Project) -> dict[tuple[str, int], Wear]:
    """Tell what versions have been through, by model and number: what the project's monitor knows.

    Raises:
        MonitorError: the monitor's files cannot be read.
    """
    folder = project.monitor_folder
    if not (folder / MONITOR_FILE).is_file():
        return {}
    worse: dict[tuple[str, str], list[str]] = {}
    for alarm in AlarmLog(folder).standing():
        if alarm.kind is AlarmKind.PERFORMANCE:
            worse.setdefault((alarm.model, alarm.version), []).append(alarm.subject)
    with closing(Store(folder)) as store:
        seen = {(one.model, one.version) for one in store.watched()}
        return {
            (model, int(version)): Wear(
                rows=store.count_rows(model, version),
                worse=tuple(worse.get((model, version), ())),
            )
            for model, version in seen
            if version.isdecimal()
        }


def ancestry_of(project: Project, name: str = "", state: Path | None = None) -> Ancestry:
    """Build the lineage graph of one model, or of all models of the registry.

    Raises:
        RegistryError: there is no registry yet, or no such model.
        FederationError: `state` holds no audit log.
    """
    if not project.has_registry:
        raise RegistryError("no model is registered yet; make one with: minga run")
    registry = project.registry()
    names = [name] if name else registry.names()
    return build_ancestry(
        [pair for each in names for pair in _versions(registry, each)],
        services_everywhere(project, name, state),
    )


def _versions(registry: Registry, name: str) -> Iterator[tuple[Version, Lineage]]:
    for version in registry.list_versions(name):
        yield version, Lineage.read(registry.fetch(name, version.version) / LINEAGE)


def device_services(state: Path) -> Iterator[Service]:
    """Tell what devices ran where and when: each period lasts until the device says otherwise.

    Args:
        state: the coordinator's state folder or an export of its audit log.

    Raises:
        FederationError: there is no audit log.
    """
    open_ones: dict[tuple[str, str], Service] = {}
    log = state / DATABASE_FILE if state.is_dir() else state
    for record in read_log(log):
        if not isinstance(record, Entry) or record.kind != Kind.MODEL_REPORTED:
            continue
        details = record.details
        if details.get("state") != "active":
            continue
        key = (record.subject, str(details["model"]))
        if (before := open_ones.get(key)) is not None:
            yield before.model_copy(update={"until": record.time, "seen_at": record.time})
        open_ones[key] = Service(
            model=str(details["model"]),
            version=str(details["version"]),
            place=record.subject,
            onnx_sha256=str(details["digest"]),
            since=record.time,
            until="",
            seen_at=record.time,
        )
    yield from open_ones.values()
