"""What operators watch Minga with: Prometheus' rules, Alertmanager's route, Grafana's dashboard.

The files lie in this package and are written out by `minga observe`. Minga itself needs none of
the three programs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Final

from minga.cluster.errors import ProjectError
from minga.federation.durable import replace_file

FILES: Final = (
    "prometheus.yml",
    "rules/recording.yml",
    "rules/alerts.yml",
    "rules/tests.yml",
    "alertmanager.yml",
    "grafana/dashboard.json",
    "grafana/datasource.yml",
    "grafana/provider.yml",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """Whom Prometheus scrapes and tells, `host:port` each; an empty part leaves its file alone.

    Attributes:
        devices: name -> where its /metrics is.
    """

    serving: Sequence[str] = ()
    coordinator: Sequence[str] = ()
    devices: Mapping[str, str] = field(default_factory=dict)
    respond: Sequence[str] = ()
    alertmanager: Sequence[str] = ()

    def files(self) -> dict[str, str]:
        """Give the files of Prometheus' service discovery: name -> content, JSON, which is YAML."""
        groups = {
            "serving": [{"targets": [each]} for each in self.serving],
            "coordinator": [{"targets": [each]} for each in self.coordinator],
            "devices": [
                {"targets": [address], "labels": {"device": name}}
                for name, address in self.devices.items()
            ],
            "respond": [{"targets": [each]} for each in self.respond],
            "alertmanager": [{"targets": [each]} for each in self.alertmanager],
        }
        return {
            f"targets/{name}.yml": json.dumps(listed, indent=2) + "\n"
            for name, listed in groups.items()
        }


def write(
    folder: Path, targets: Targets, *, url: str, token_file: Path, replace: bool = False
) -> tuple[Path, ...]:
    """Write all files, ready to be started from their folder.

    Files that are there and say the same are left alone, and so are lists of targets for which
    nothing is named.

    Args:
        folder: is made if it is missing.
        targets: whom Prometheus scrapes and tells.
        url: where Alertmanager's webhook is received.
        token_file: holds what the webhook shows to be let in.
        replace: also write over files that were changed.

    Returns:
        the files that were written.

    Raises:
        ProjectError: a file is there already and is another one.
    """
    package = files(__package__)
    contents = {name: (package / name).read_text(encoding="utf-8") for name in FILES}
    contents["alertmanager.yml"] = Template(contents["alertmanager.yml"]).substitute(
        url=json.dumps(url), token_file=json.dumps(str(token_file))
    )
    changed = [name for name, text in contents.items() if _read(folder / name) not in (None, text)]
    if changed and not replace:
        raise ProjectError(
            f"{folder / changed[0]} is there already and is another one; name another folder, or "
            "write over it with: --replace"
        )
    for name, text in targets.files().items():
        if json.loads(text) or _read(folder / name) is None:
            contents[name] = text
    written = [name for name, text in contents.items() if _read(folder / name) != text]
    for name in written:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        replace_file(folder / name, contents[name].encode())
    return tuple(folder / name for name in written)


def _read(file: Path) -> str | None:
    """Give a file's text; None if there is none."""
    return file.read_text(encoding="utf-8") if file.exists() else None
