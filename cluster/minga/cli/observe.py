"""`minga observe`: the files of Prometheus, Alertmanager and Grafana."""

from pathlib import Path

from minga.cli.output import print_json, print_line, print_note


def observe(
    directory: Path = Path("observe"),
    *,
    project: Path = Path(),
    serving: tuple[str, ...] = (),
    coordinator: tuple[str, ...] = ("127.0.0.1:9464",),
    device: dict[str, str] | None = None,
    alertmanager: tuple[str, ...] = ("127.0.0.1:9093",),
    replace: bool = False,
    json: bool = False,
) -> None:
    """Write what Prometheus, Alertmanager and Grafana need to watch this project's processes.

    Rules that record and alert, with their unit tests; whom to scrape, in targets/, which may be
    edited while Prometheus runs; the route of alerts to `minga respond run`; a dashboard.

    Example: minga observe

    Example: minga observe watching --device.press-7 10.0.3.7:8080 --device.press-8 10.0.3.8:8080

    Args:
        directory: The folder to write.
        project: The project folder, whose minga.toml says where it serves.
        serving: host:port of a central server, instead of the configured one.
        coordinator: host:port of the coordinator's metrics.
        device: host:port of a device's local server: --device.NAME host:port.
        alertmanager: host:port of Alertmanager.
        replace: Also write over files that were changed.
        json: Print JSON.
    """
    from minga.cluster.observability import Targets, write
    from minga.cluster.project import load
    from minga.cluster.response.receiver import TOKEN_FILE, token_of
    from minga.cluster.response.responder import folder_of
    from minga.inference.server import url_host

    loaded = load(project)
    where, folder = loaded.respond, folder_of(loaded)
    respond = f"{url_host(where.host)}:{where.port}"
    token_of(folder)
    targets = Targets(
        serving=serving or (f"{url_host(loaded.serving.host)}:{loaded.serving.port}",),
        coordinator=coordinator,
        devices=device or {},
        respond=(respond,),
        alertmanager=alertmanager,
    )
    written = write(
        directory,
        targets,
        url=f"http://{respond}/alerts",
        token_file=folder / TOKEN_FILE,
        replace=replace,
    )
    if json:
        print_json([str(file) for file in written])
        return
    print_line(f"{len(written)} files written to {directory}")
    print_note(f"next: cd {directory} && prometheus --config.file=prometheus.yml")
