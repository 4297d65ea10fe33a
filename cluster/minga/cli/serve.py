"""`minga serve`: the registry's champions over HTTP, swapped when they change."""

import contextlib
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from minga.cli.output import print_line
from minga.cli.services import log_to_stderr, run_service

if TYPE_CHECKING:
    from minga.inference.engine import ModelRef
    from minga.serving.config import ServingConfig
    from minga.serving.registry_source import RegistrySource

Port = Annotated[int | None, Parameter(validator=Number(gte=0, lte=65535))]


def serve(
    *models: str,
    project: Path | None = None,
    host: str | None = None,
    port: Port = None,
    grpc_port: Port = None,
    keys: Path | None = None,
    tls_certificate: Path | None = None,
    tls_key: Path | None = None,
    allow_anonymous: Annotated[bool, Parameter(negative=())] = False,
    engine: Literal["ray", "local"] = "ray",
    export: Path | None = None,
) -> None:
    """Serve registered models over the Open Inference Protocol v2 until Ctrl-C.

    When the champion of a model changes, the new version is loaded and tested first and then
    takes over; no request fails. A version that cannot be loaded is refused and logged, and the
    one before goes on answering. Settings are the [serving] table of minga.toml.

    Example: minga serve

    Beyond 127.0.0.1 callers must be known: `minga key create` makes keys, and a project that has
    some wants one with each request, except for the server's health.

    Example: minga serve machine-failure --port 9000 --grpc-port 9001 --engine local

    Example: minga serve machine-failure/3 forecast@challenger

    Args:
        models: The models to serve, as NAME, NAME@ALIAS or NAME/VERSION; by default all that have
            a champion.
        project: The project folder. Without one here, MINGA_TRACKING_URI says which registry.
        host: The address to listen on, instead of the configured one.
        port: The port to listen on, instead of the configured one; 0 takes a free one.
        grpc_port: The port to listen on for gRPC, which is off unless it is configured or given.
        keys: The file of API keys; by default the project's, if it has one.
        tls_certificate: The server's certificate chain, PEM; both wires then speak TLS.
        tls_key: Its private key, PEM.
        allow_anonymous: Answer everyone, also beyond this machine.
        engine: `ray` serves from replicas on Ray Serve, `local` from this process alone, which
            starts in a second and needs a tenth of the memory.
        export: Serve nothing, but write a config file with which `serve deploy` or KubeRay serves
            the versions of today on a Ray cluster whose machines can read the models' files.
    """
    files = {"keys": keys, "tls_certificate": tls_certificate, "tls_key": tls_key}
    chosen = {
        "host": host,
        "port": port,
        "grpc_port": grpc_port,
        "allow_anonymous": allow_anonymous or None,
        **{name: str(file.absolute()) for name, file in files.items() if file is not None},
    }
    config, tracking_uri = configured(project, chosen)
    from minga.serving.referee import Referee
    from minga.serving.registry_source import RegistrySource, parse_pins
    from minga.serving.watcher import current_versions

    pins = parse_pins(models)
    source = RegistrySource(
        tracking_uri,
        alias=config.alias,
        pins={name: pin for name, pin in pins.items() if pin is not None},
        downloads=None if export is None else Path(f"{export}.models").absolute(),
    )
    refs = current_versions(source, pins or source.names())
    if export is not None:
        _export(export, config, refs)
    elif engine == "local":
        from minga.serving.local import serve_locally

        announce = partial(_announce, refs)
        referee = Referee(source.book(), config.comparison, source.version)
        service = serve_locally(
            config, source, refs, announce, tracking_uri=tracking_uri, referee=referee
        )
        run_service(service, fast=True)
    else:
        _serve_on_ray(config, source, refs, tracking_uri)


def configured(
    project: Path | None, chosen: Mapping[str, str | int | None]
) -> tuple["ServingConfig", str]:
    """Give the configuration and the registry, from a project or from the environment alone."""
    from minga.cluster.project import FILE, MONITOR_FOLDER, load
    from minga.cluster.settings import Settings
    from minga.serving.config import ServingConfig

    config, uri = ServingConfig.model_validate({}), Settings().tracking_uri
    monitor_folder = Path(MONITOR_FOLDER).absolute()  # replicas work in folders of their own
    if project is not None or not uri or Path(FILE).is_file():
        loaded = load(project or Path())
        config, uri = loaded.protected_serving, loaded.tracking_uri
        monitor_folder = loaded.monitor_folder
    config = config.watched_in(monitor_folder)
    given = {name: value for name, value in chosen.items() if value is not None}
    return config.model_copy(update=given), uri


def _export(file: Path, config: "ServingConfig", refs: Sequence["ModelRef"]) -> None:
    import yaml

    from minga.serving.errors import ServingError
    from minga.serving.host import serve_config

    if 0 in (config.port, config.grpc_port):
        raise ServingError("a config file names its ports; give one that is not 0")
    text = yaml.safe_dump(serve_config(config, refs), sort_keys=False)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ServingError(f"cannot write {file} ({error.strerror})") from error
    for ref in refs:
        print_line(f"model {ref} from {ref.path}")
    print_line(f"written {file}; on a machine of the Ray cluster: serve deploy {file}")


def _serve_on_ray(
    config: "ServingConfig", source: "RegistrySource", refs: Sequence["ModelRef"], tracking_uri: str
) -> None:
    import threading

    from minga.cluster.following import following
    from minga.cluster.stack import local_ray
    from minga.inference.server import listen
    from minga.serving.referee import Referee

    config.protection.check(config.host)
    listen(config.host, config.port).close()  # before Ray takes its seconds to start
    log_to_stderr()
    cpus = max(os.cpu_count() or 1, math.ceil(config.num_replicas * config.cpus_per_replica))
    with local_ray(num_cpus=cpus):
        # Ray's own handler would leave without stopping what it serves.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        referee = Referee(source.book(), config.comparison, source.version)
        with following(config, source, refs, tracking_uri=tracking_uri, referee=referee) as serving:
            _announce(refs, serving.url, serving.grpc_url)
            with contextlib.suppress(KeyboardInterrupt):  # how one ends serving
                threading.Event().wait()


def _announce(refs: Sequence["ModelRef"], url: str, grpc_url: str | None) -> None:
    for ref in refs:
        print_line(f"serving model {ref} at {url}/v2/models/{ref.name}")
    if grpc_url is not None:
        print_line(f"gRPC at {grpc_url}")
    print_line(f"ready at {url}; Ctrl-C stops serving, the models stay registered")
    sys.stdout.flush()
