"""Writes the reference pages of the documentation from the code that they describe.

Run as `python -m minga.cli.reference docs/reference`; a test says when that is due. What is
said of commands, keys, exit codes and metrics is said where they are defined.
"""

import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from minga.cli.app import COMMANDS, app
from minga.cli.failures import EXIT_CODES
from minga.cluster.project import Project, tables_of
from minga.cluster.response.metrics import Metrics as RespondMetrics
from minga.cluster.settings import Settings
from minga.federation.coordinator.metrics import Metrics as CoordinatorMetrics
from minga.federation.coordinator.settings import CoordinatorSettings
from minga.federation.device.metrics import Metrics as DeviceMetrics
from minga.federation.device.settings import DeviceSettings
from minga.inference.metrics import InferenceMetrics
from minga.inference.monitor.metrics import MonitorSeries
from minga.inference.monitor.observer import Observer
from minga.inference.monitor.summary import ModelSummary
from minga.inference.monitor.traffic import Traffic
from minga.inference.repository import ModelRepository

_NOTE: Final = "<!-- Written by `make docs` from the code; change it there. -->\n"

_TYPES: Final = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "Path": "path",
    "dict": "table",
    "tuple": "list",
}
"""Python's name of a type -> what a reader of TOML calls it."""

_EVERY_COMMAND: Final = """\
| key | type | default | meaning |
|---|---|---|---|
| `MINGA_DEBUG` | `1` | empty | Errors end with a traceback, as with `--debug`. |
| `MINGA_LOG_LEVEL` | text | `INFO` | What the commands that run until Ctrl-C log on stderr. |"""

_SIGNS: Final = ((Ge, "ge", "from"), (Gt, "gt", "above"), (Le, "le", "to"), (Lt, "lt", "below"))


def commands_page() -> str:
    """Write every command with its parameters and examples."""
    for name in COMMANDS:
        if app[name].default_command is not None:
            app[name].help = None  # the docstring of the command instead of its line in the list
    text = app.generate_docs(output_format="markdown", recursive=True, usage_name="minga")
    text = re.sub(r"^## Table of Contents\n.*?(?=^\*\*Commands)", "", text, flags=re.M | re.S)
    return _NOTE + re.sub(r"^Example: (.+)$", r"```bash\n\1\n```", text, flags=re.M)


def configuration_page() -> str:
    """Write every key of `minga.toml` and every setting of the environment."""
    sections = [
        "# Configuration",
        "A *job* is the file `minga.toml` of a project folder. Unknown keys, wrong types and "
        "impossible values are all reported at once, by their path. Where a *process* finds what "
        "it needs is set in its environment.",
        "## minga.toml",
        *_tables(Project),
        "## Environment",
        "### Every command",
        _EVERY_COMMAND,
        *_environment(Settings, "Central machine"),
        *_environment(CoordinatorSettings, "Coordinator"),
        *_environment(DeviceSettings, "Device"),
    ]
    return _NOTE + "\n\n".join(sections) + "\n"


def exit_codes_page() -> str:
    """Write which error ends the command with which exit code."""
    table = importlib.import_module("minga.cli.failures").__doc__ or ""
    fixed = re.findall(r"^\| \d+ \|.*$", table, flags=re.M)
    rows = [f"| {code} | {_summary_of(name)} | `{name}` |" for name, code in _sorted_codes()]
    general = "\n".join(["| code | meaning |", "|---|---|", "| 0 | done |", *fixed])
    special = "\n".join(["| code | meaning | error |", "|---|---|---|", *rows])
    return (
        f"{_NOTE}# Exit codes\n\nEvery failure that Minga foresees is one or two lines on stderr "
        "with a remedy, and a code of its own. An error that is not listed ends with the code of "
        "its nearest listed base class. `--debug`, or `MINGA_DEBUG=1`, shows the traceback.\n\n"
        f"{general}\n\n{special}\n"
    )


def metrics_page() -> str:
    """Write the series that Prometheus finds on each process."""
    inference = CollectorRegistry()
    InferenceMetrics(ModelRepository(), inference)
    sections = [
        "# Metrics",
        "## Coordinator",
        "At `http://HOST:METRICS_PORT/metrics`, port 9464 unless told otherwise.",
        _series(CoordinatorMetrics().registry),
        "## Device",
        "At `/metrics` of the device's local inference server, port 8080 unless told otherwise, "
        "together with the series of inference below.",
        _series(DeviceMetrics().registry),
        "## Inference",
        "At `/metrics` of every server that answers requests: a device, and `minga serve`, where "
        "with several replicas each of them tells of all: sums, and gauges of those that live.",
        _series(inference),
        "## Monitor",
        "At the same place, where what is served is watched. Series with a version are of its "
        "newest full window, which on Ray Serve is over all replicas.",
        _series(_monitor()),
        "## Responder",
        "At `/metrics` of `minga respond run`, port 8070 unless told otherwise.",
        _series(RespondMetrics().registry),
    ]
    return _NOTE + "\n\n".join(sections) + "\n"


def _monitor() -> CollectorRegistry:
    class Nowhere:
        """Takes nothing, since nothing is served."""

        def take(self, _: Sequence[Traffic]) -> Sequence[ModelSummary]:
            return ()

    registry = CollectorRegistry()
    registry.register(MonitorSeries(Observer(Nowhere()), ModelRepository()))
    return registry


PAGES: Final = {
    "cli.md": commands_page,
    "configuration.md": configuration_page,
    "exit-codes.md": exit_codes_page,
    "metrics.md": metrics_page,
}
"""File -> what writes it."""


def _tables(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Write a model's own keys as one table, then those of the models inside it."""
    inner = {name: tables_of(field) for name, field in model.model_fields.items()}
    yield f"### `[{path}]`" if path else "### Top level"
    yield _keys((name, field) for name, field in model.model_fields.items() if not inner[name])
    for name, tables in inner.items():
        if len(tables) == 1:
            yield from _tables(tables[0], f"{path}.{name}" if path else name)
        elif tables:
            yield f"### `[{path}.{name}]`"
            yield from _choices(model.model_fields[name], tables)


def _choices(field: FieldInfo, tables: Iterable[type[BaseModel]]) -> Iterator[str]:
    """Write the keys of the tables that a table's `name` chooses among."""
    default = field.get_default(call_default_factory=True)
    without = "" if default is None else f" Without this table it is `{default.name}`."
    yield f"{_flat(field.description)}{without}"
    for table in tables:
        name = table.model_fields["name"]
        yield f'`name = "{name.default}"`: {_flat(name.description)}'
        yield _keys((key, field) for key, field in table.model_fields.items() if key != "name")


def _environment(settings: type[BaseSettings], title: str) -> Iterator[str]:
    prefix = settings.model_config["env_prefix"]
    yield f"### {title}"
    yield _keys(((prefix + name).upper(), field) for name, field in settings.model_fields.items())


def _keys(fields: Any) -> str:
    rows = [
        f"| `{name}` | {_type_of(field)} | {_default_of(field)} | {_flat(field.description)} |"
        for name, field in fields
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _type_of(field: FieldInfo) -> str:
    return _type(field.annotation, field.metadata)


def _type(kind: Any, metadata: Iterable[Any] = ()) -> str:
    """Name a type with its bounds, or several of which one is meant."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in parts)
    if origin is Annotated:
        return _type(parts[0], parts[1].metadata)
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts if part is not NoneType)
    bounds = [
        f"{word} {getattr(bound, name)}"
        for bound in metadata
        for sign, name, word in _SIGNS
        if isinstance(bound, sign)
    ]
    return " ".join([_TYPES[getattr(kind, "__name__", str(kind))], *bounds])


def _default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value in ("", {}, (), None):
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _flat(text: str | None) -> str:
    assert text, "every key has a docstring"
    return " ".join(text.split()).replace("|", r"\|")


def _sorted_codes() -> list[tuple[str, int]]:
    return sorted(EXIT_CODES.items(), key=lambda item: (item[1], item[0]))


def _summary_of(error: str) -> str:
    module, _, name = error.rpartition(".")
    documentation = getattr(importlib.import_module(module), name).__doc__
    return _flat(documentation.partition("\n\n")[0])


def _series(registry: CollectorRegistry) -> str:
    rows = [
        f"| `{family.name}{'_total' * (family.type == 'counter')}` | {family.type} "
        f"| {_labels_of(collector, family)} | {_flat(family.documentation)} |"
        for collector in registry._collector_to_names
        for family in collector.collect()
    ]
    return "\n".join(["| name | type | labels | meaning |", "|---|---|---|---|", *rows])


def _labels_of(collector: Collector, family: Metric) -> str:
    # prometheus_client has no public way to tell the labels of series without a value so far.
    names: tuple[str, ...] = getattr(collector, "_labelnames", getattr(family, "_labelnames", ()))
    return ", ".join(f"`{name}`" for name in names) or "-"


def main() -> None:
    """Write all pages into the folder that the command line names."""
    folder = Path(sys.argv[1])
    sys.argv = ["minga"]  # cyclopts takes the name of nested commands from here
    for name, write in PAGES.items():
        (folder / name).write_text(write(), encoding="utf-8")


if __name__ == "__main__":
    main()
