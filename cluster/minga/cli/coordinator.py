"""`minga coordinator`: run the federation's server, make enrolment tokens."""

import asyncio
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from minga.cli.output import print_json, print_line

app = App(name="coordinator", help="Run the federation's server, make tokens.")


def _set_by(name: str) -> Parameter:
    """Let the environment set what no flag sets, under the name that the settings have."""
    return Parameter(env_var=f"MINGA_COORDINATOR_{name}")


State = Annotated[Path, _set_by("STATE")]


@app.command
def run(
    *,
    state: State = Path("coordinator"),
    host: Annotated[str, _set_by("HOST")] = "127.0.0.1",
    public_host: Annotated[str, _set_by("PUBLIC_HOST")] = "",
    port: Annotated[int, _set_by("PORT")] = 7443,
    enrol_port: Annotated[int, _set_by("ENROL_PORT")] = 7444,
    metrics_port: Annotated[int, _set_by("METRICS_PORT")] = 9464,
    reconnect_grace: Annotated[float, _set_by("RECONNECT_GRACE_S")] = 10.0,
    strategy: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    device_certificate_hours: Annotated[float, _set_by("DEVICE_CERTIFICATE_HOURS")] = 720.0,
    operator_certificate_hours: Annotated[float, _set_by("OPERATOR_CERTIFICATE_HOURS")] = 720.0,
    server_certificate_hours: Annotated[float, _set_by("SERVER_CERTIFICATE_HOURS")] = 2160.0,
    unmasking: Annotated[Literal["threads", "ray"], _set_by("UNMASKING")] = "threads",
) -> None:
    """Run the coordinator until Ctrl-C; it goes on where it was after a crash.

    The state folder gets a database, the federation's authority, blobs, and an operator's identity
    in `operator/` that `minga federate`, `minga status` and `minga device list` use.

    Example: minga coordinator run --state ./coordinator --host 0.0.0.0 --public-host fleet.example

    Args:
        state: Folder of everything that must survive.
        host: Address to listen on.
        public_host: Name or address under which devices dial; the default is the one listened on.
        port: Port of enrolled devices and operators (mutual TLS); 0 takes a free one.
        enrol_port: Port where tokens are redeemed (server TLS); 0 takes a free one.
        metrics_port: Port of the Prometheus endpoint; 0 takes a free one.
        reconnect_grace: Seconds that a device may be away during a round before it counts as lost.
        strategy: A strategy written for Flower, `package.module:attribute`, that campaigns may
            name beside Flower's own; it is run here. Give it again for more.
        device_certificate_hours: How long a device's certificate holds; devices renew by
            themselves, after two thirds of that.
        operator_certificate_hours: How long the certificate in `operator/` holds.
        server_certificate_hours: How long the coordinator's own certificate holds; it is replaced
            while the coordinator runs.
        unmasking: What takes masks off a round's sum: threads, or actors on Ray (the cluster that
            RAY_ADDRESS names, or one started on this machine). Ray pays where a cluster has many
            more cores than this machine; the masks' keys travel to it.
    """
    from contextlib import ExitStack

    from minga.cli.services import run_service
    from minga.federation.coordinator.server import run as serve
    from minga.federation.coordinator.settings import CoordinatorSettings

    given: dict[str, Any] = {"strategies": strategy} if strategy else {}  # else the environment's
    settings = CoordinatorSettings(
        state=state,
        host=host,
        public_host=public_host,
        port=port,
        enrol_port=enrol_port,
        metrics_port=metrics_port,
        reconnect_grace_s=reconnect_grace,
        device_certificate_hours=device_certificate_hours,
        operator_certificate_hours=operator_certificate_hours,
        server_certificate_hours=server_certificate_hours,
        unmasking=unmasking,
        **given,
    )
    with ExitStack() as stack:
        if settings.unmasking == "ray":
            from minga.cluster.unmasking import ray_unmasking

            run_service(serve(settings, stack.enter_context(ray_unmasking())))
        else:
            run_service(serve(settings))


@app.command
def token(
    group: str = "default",
    *,
    state: State = Path("coordinator"),
    lifetime_hours: float = 24.0,
    json: bool = False,
) -> None:
    """Make a token that lets one device into a group; it is shown this once.

    Example: minga coordinator token line-3 --lifetime-hours 2

    Args:
        group: The group that the device joins.
        state: The coordinator's state folder, or an operator's identity folder.
        lifetime_hours: How long the token can be redeemed.
        json: Print JSON.
    """
    from minga.federation.operator import connect

    async def create() -> tuple[str, str]:
        async with connect(state) as operator:
            response = await operator.create_token(group, round(lifetime_hours * 3600))
        return response.token, response.expires_at.ToJsonString()

    text, expires_at = asyncio.run(create())
    if json:
        print_json({"token": text, "group": group, "expires_at": expires_at})
    else:
        print_line(text)


@app.command
def revoke(identity: Literal["operator", "audit"], *, state: State = Path("coordinator")) -> None:
    """Give one of the coordinator's own identities another key and refuse the one before.

    For a copy of the `operator` folder that was lost or stolen: every certificate for its key is
    refused at the next call, and calls that run end. The coordinator writes the new identity into
    its state folder; operators elsewhere need a new copy of it. Devices are revoked by name, with
    `minga device revoke`.

    Example: minga coordinator revoke operator --state ./coordinator

    Args:
        identity: Whose key: the operator's, or that of the service that signs the audit log.
        state: The coordinator's state folder, or an operator's identity folder.
    """
    from minga.federation.operator import connect

    path = {"operator": "operator/operator", "audit": "service/audit"}[identity]

    async def refuse() -> bytes:
        async with connect(state) as operator:
            return await operator.revoke_identity(path)

    digest = asyncio.run(refuse())
    print_line(f"{path} has another key; {digest.hex()[:16]} is refused from now on")


@app.command
def request(file: Path, *, root: Path | None = None, state: State = Path("coordinator")) -> None:
    """Ask an offline root for the intermediate that this coordinator issues certificates with.

    Makes a new key, which stays here, and writes a signing request for `minga root sign`. Needed
    before the first start, in an empty state folder; and again to replace the intermediate, before
    it ends or because somebody may have its key. A coordinator that runs is not disturbed.

    Example: minga coordinator request request.pem --root root.pem

    Args:
        file: Where to write the request.
        root: The root's certificate, `root.pem`; later the default is the one from before.
        state: The coordinator's state folder; made if missing.
    """
    from minga.federation.certificates import load_certificate
    from minga.federation.coordinator import intermediate
    from minga.federation.coordinator.authority import AUTHORITY_FOLDER
    from minga.federation.coordinator.root import fingerprint
    from minga.federation.errors import IdentityError
    from minga.federation.identity import utc_now

    folder = state / AUTHORITY_FOLDER
    if root is None and not (folder / intermediate.ROOT_FILE).exists():
        raise IdentityError(f"{state} knows no offline root yet; name its certificate: --root")
    certificate = load_certificate(root or folder / intermediate.ROOT_FILE)
    csr = intermediate.request(folder, certificate, utc_now())
    intermediate.write_request(file, csr)
    print_line(f"request      {file}, for: minga root sign")
    print_line(f"root         {fingerprint(certificate)}; compare it with what its machine shows")


@app.command
def install(intermediate: Path, *, state: State = Path("coordinator")) -> None:
    """Put the intermediate in place that the offline root signed; start the coordinator after that.

    Devices go over to it by themselves, and refuse the one before from then on.

    Example: minga coordinator install intermediate.pem

    Args:
        intermediate: What `minga root sign` wrote.
        state: The coordinator's state folder.
    """
    from minga.federation.certificates import load_certificate
    from minga.federation.coordinator import intermediate as intermediates
    from minga.federation.coordinator.authority import AUTHORITY_FOLDER
    from minga.federation.identity import utc_now

    certificate = load_certificate(intermediate)
    intermediates.install(state / AUTHORITY_FOLDER, certificate, utc_now())
    print_line(
        f"intermediate {certificate.serial_number} issues from the coordinator's next start on, "
        f"until {certificate.not_valid_after_utc:%Y-%m-%d}"
    )


@app.command
def cancel(campaign: str, *, state: State = Path("coordinator")) -> None:
    """Stop a campaign; rounds that were committed stay.

    Example: minga coordinator cancel 3f9a0c1d2b4e

    Args:
        campaign: The campaign's name, as `minga status` shows it.
        state: The coordinator's state folder, or an operator's identity folder.
    """
    from minga.federation.operator import connect

    async def stop() -> None:
        async with connect(state) as operator:
            await operator.cancel(campaign)

    asyncio.run(stop())
    print_line(f"campaign {campaign} is cancelled")
