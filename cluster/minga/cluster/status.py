"""What runs, where, in which versions: registry, central serving and federation at a glance.

A part that is not there is no error: its row says so and how to start it.
"""

import asyncio
from pathlib import Path
from typing import Any

from minga.cluster.fleet import describe_campaign, describe_devices
from minga.cluster.project import Project
from minga.federation.errors import FederationError, IdentityError
from minga.federation.operator import connect
from minga.inference.client import InferenceClient
from minga.inference.credentials import Credentials
from minga.inference.errors import ClientError
from minga.inference.server import url_host
from minga.inference.uris import redacted, scrubbed
from minga.training.errors import TrainingError
from minga.training.registry import Registry
from minga.training.tracking import REGISTRY_ERRORS

_TIMEOUT_S = 5.0


def gather(project: Project, state: Path) -> dict[str, Any]:
    """Ask every part.

    Args:
        project: whose registry and serving are looked at.
        state: the coordinator's state folder, or an operator's identity folder.
    """
    serving = project.serving
    scheme = "https" if serving.tls_certificate else "http"
    return {
        "registry": _registry(project),
        "serving": _serving(f"{scheme}://{url_host(serving.host)}:{serving.port}"),
        "federation": asyncio.run(_federation(state)),
    }


def _registry(project: Project) -> dict[str, Any]:
    part: dict[str, Any] = {"uri": redacted(project.tracking_uri), "models": [], "note": ""}
    if not project.has_registry:
        return part | {"note": "no model is registered yet; make one with: minga run"}
    try:
        registry = Registry(project.tracking_uri)
        for name in registry.names():
            for version in registry.list_versions(name):
                row = {
                    "model": name,
                    "version": version.version,
                    "aliases": list(version.aliases),
                    "blessed": version.blessed,
                }
                part["models"].append(row)
    except TrainingError as error:
        part["note"] = str(error)
    except REGISTRY_ERRORS as error:
        reason = scrubbed(str(error), project.tracking_uri).partition("\n")[0]
        part["note"] = f"the registry does not answer: {reason}"
    return part


def _serving(url: str) -> dict[str, Any]:
    part: dict[str, Any] = {"url": url, "ready": False, "models": [], "note": ""}
    credentials = Credentials.from_environment()
    with InferenceClient(url, timeout_s=_TIMEOUT_S, credentials=credentials) as client:
        part["ready"] = client.ready()
        if not part["ready"]:
            return part | {"note": "nothing is served here; start it with: minga serve"}
        try:
            for name in client.models():
                part["models"].append({"model": name, **client.metadata(name)})
        except ClientError as error:
            part["note"] = str(error)
    return part


async def _federation(state: Path) -> dict[str, Any]:
    part: dict[str, Any] = {"state": str(state), "running": False, "note": ""}
    try:
        async with connect(state) as operator:
            status = await operator.status()
        part |= {
            "running": True,
            "address": operator.address,
            "version": status.version,
            "num_devices": status.num_devices,
            "num_connected": status.num_connected,
            "peak_memory_bytes": status.peak_memory_bytes,
            "campaigns": [describe_campaign(campaign) for campaign in status.campaigns],
            "published": [
                {"model": one.model.name, "version": one.model.version, "group": one.group}
                for one in status.models
            ],
            "devices": await describe_devices(state),
        }
    except IdentityError:
        part["note"] = "there is no coordinator here; start one with: minga coordinator run"
    except FederationError as error:
        part["note"] = str(error)
    return part
