"""`minga device`: enrol and run a device; list and revoke the fleet's devices."""

import asyncio
import socket
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from minga.cli.output import print_json, print_line, print_table

app = App(name="device", help="Enrol and run an edge device; list and revoke devices.")

Token = Annotated[str, Parameter(allow_leading_hyphen=True)]


def _set_by(name: str) -> Parameter:
    """Let the environment set what no flag sets, under the name that the settings have."""
    return Parameter(env_var=f"MINGA_DEVICE_{name}")


Folder = Annotated[Path, _set_by("FOLDER")]
State = Annotated[Path, Parameter(help="The coordinator's state folder, or an operator's.")]


@app.command
def enroll(token: Token, *, folder: Folder = Path("device"), name: str = "") -> None:
    """Turn a one-time token into this device's identity; its key never leaves the folder.

    Example: minga device enroll "$TOKEN" --name press-7

    Args:
        token: What `minga coordinator token` printed; '-' reads it from standard input, where
            other users of this machine cannot see it.
        folder: Where identity and models are kept; made if missing.
        name: The device's name: a-z, 0-9 and '-'. The default is this machine's name.
    """
    import sys

    from minga.federation.device.enrolment import enrol

    text = sys.stdin.read().strip() if token == "-" else token  # noqa: S105 - not a password
    wanted = name or socket.gethostname().split(".")[0].lower()
    identity = asyncio.run(enrol(text, folder, wanted))
    print_line(f"enrolled as {identity.name}; start it with: minga device run --folder {folder}")


@app.command
def run(
    *,
    folder: Folder = Path("device"),
    project: Path | None = None,
    source: str = "",
    trainer: Annotated[str, _set_by("TRAINER")] = "",
    option: dict[str, str] | None = None,
    allow_plain: Annotated[bool, _set_by("ALLOW_PLAIN")] = False,
    min_noise: Annotated[float, _set_by("MIN_NOISE")] = 0.0,
    min_summed: Annotated[int, _set_by("MIN_SUMMED")] = 3,
    allow_query: Annotated[tuple[str, ...], _set_by("QUERY_COLUMNS")] = (),
    compress: Annotated[Literal["auto", "always", "never"], _set_by("COMPRESS")] = "auto",
    host: Annotated[str, _set_by("HOST")] = "127.0.0.1",
    port: Annotated[int, _set_by("PORT")] = 8080,
    grpc_port: Annotated[int | None, _set_by("GRPC_PORT")] = None,
    keys: Annotated[Path | None, _set_by("KEYS")] = None,
    tls_certificate: Annotated[Path | None, _set_by("TLS_CERTIFICATE")] = None,
    tls_key: Annotated[Path | None, _set_by("TLS_KEY")] = None,
    allow_anonymous: Annotated[bool, _set_by("ALLOW_ANONYMOUS")] = False,
) -> None:
    """Run this device until Ctrl-C: join rounds, fetch models, answer predictions on site.

    With --project and --source it trains that project's Task on this site's data; without them
    it only runs models. A project that names a Flower app, in minga.toml or as Flower does in
    pyproject.toml, trains with that instead. A coordinator that is away is dialled again, and the
    local model answers meanwhile.

    Example: minga device run --project ./plant --source data/site.csv

    Example: minga device run --project ./flower-app --option.partition-id 3

    Args:
        folder: Identity and models, made by `minga device enroll`.
        project: A project folder; its Task, or its Flower app, trains here.
        source: This site's data, as the Task's `data` method takes it.
        trainer: Instead of a project: `package.module:attribute` that makes a LocalTrainer.
        option: What that trainer is made with: --option.name value; a Flower app finds it in its
            Context's node_config.
        allow_plain: Take part in rounds whose coordinator sees this device's update; without it
            only in those that mask updates.
        min_noise: Train only in rounds of distributed privacy with at least this noise_multiplier,
            also if a tenth of the devices adds none; this device checks it by itself.
        min_summed: Hide among so many updates at the least, this device's included: it takes part
            in no secure round whose sum may have fewer, however many are lost on the way.
        allow_query: Column of this site's data of which statistics may be asked, in sums over
            many devices alone; may be given several times.
        compress: When models and plain updates travel as Zstandard frames: auto does so while
            the link is measured to be slower than 5 MB/s.
        host: Address of the local inference server. Beyond 127.0.0.1 its callers must be known.
        port: Port of the local inference server and of /metrics; 0 takes a free one.
        grpc_port: Port of the local inference server for gRPC, which is off unless it is given.
        keys: The file of API keys that it wants, as `minga key create --file` makes it.
        tls_certificate: Its certificate chain, PEM; both wires then speak TLS.
        tls_key: The certificate's private key, PEM.
        allow_anonymous: Answer everyone, also beyond this machine.
    """
    from minga.cli.services import run_service
    from minga.federation.device.server import run as serve
    from minga.federation.device.settings import DeviceSettings

    options: dict[str, bool | int | float | str] = dict(option or {})
    if project is not None:
        from minga.federation.flower.folder import TRAINER, client_app_of

        is_flower = bool(client_app_of(project))
        trainer = TRAINER if is_flower else "minga.training.federated:trainer_from_options"
        options["project"] = str(project.resolve())
        if source or not is_flower:
            options["source"] = source
    # What is not given here may be in the environment.
    given: dict[str, Any] = {"trainer_options": options} if options else {}
    settings = DeviceSettings(
        folder=folder,
        trainer=trainer,
        allow_plain=allow_plain,
        min_noise=min_noise,
        min_summed=min_summed,
        query_columns=allow_query,
        compress=compress,
        host=host,
        port=port,
        grpc_port=grpc_port,
        keys=keys,
        tls_certificate=tls_certificate,
        tls_key=tls_key,
        allow_anonymous=allow_anonymous,
        **given,
    )
    run_service(serve(settings))


@app.command(name="list")
def list_(*, state: State = Path("coordinator"), group: str = "", json: bool = False) -> None:
    """List enrolled devices.

    Example: minga device list --group line-3 --json

    Args:
        state: The coordinator's state folder, or an operator's identity folder.
        group: Only this group.
        json: Print JSON.
    """
    from minga.cluster.fleet import describe_devices

    rows = asyncio.run(describe_devices(state, group))
    if json:
        print_json(rows)
        return
    columns = ("device", "group", "state", "model", "rounds", "last seen")
    print_table(
        columns,
        [
            (
                row["device"],
                row["group"],
                row["state"],
                f"{row['model']} v{row['model_version']}" if row["model"] else "-",
                str(row["rounds_counted"]),
                str(row["last_seen_at"] or "never"),
            )
            for row in rows
        ],
        empty="no device is enrolled; make a token with: minga coordinator token",
    )


@app.command
def revoke(device: str, *, state: State = Path("coordinator")) -> None:
    """Refuse a device from now on and close its stream.

    Example: minga device revoke press-7

    Args:
        device: The device's name.
        state: The coordinator's state folder, or an operator's identity folder.
    """
    from minga.federation.operator import connect

    async def refuse() -> None:
        async with connect(state) as operator:
            await operator.revoke(device)

    asyncio.run(refuse())
    print_line(f"{device} is refused from now on")
