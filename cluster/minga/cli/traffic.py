"""`minga traffic`: which versions of a model share its traffic in the centre, and how they do."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from cyclopts.validators import Number

from minga.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from minga.serving.registry_source import RegistrySource

app = App(name="traffic", help="Let two versions share a served model's traffic, and judge them.")

Share = Annotated[float, Parameter(validator=Number(gt=0, lte=1))]


@app.command
def canary(model: str, version: str, *, repair: bool = False, project: Path | None = None) -> None:
    """Let a version take over a model's traffic in growing shares, if it does no worse.

    Each stage compares failures, times and predictions with those of the version before. What
    the canary cannot answer, the version before does. After the last stage it answers all, until
    the champion changes or `minga traffic stop`; promote it to make that last. Shares and limits
    are the [serving.comparison] table of the service's minga.toml.

    Example: minga traffic canary machine-failure 7

    Args:
        model: The model, which `minga serve` serves.
        version: The version: its number, or @ALIAS.
        repair: The version repairs what the one before does wrong: its predictions may look like
            those of the one before, or like its own on its test data.
        project: The project folder. Without one here, MINGA_TRACKING_URI says which registry.
    """
    _ask("canary", model, version, 1.0, project, expects="repair" if repair else "baseline")
    print_line("the service begins at its next look; follow it with: minga traffic status")


@app.command
def shadow(model: str, version: str, *, share: Share = 1.0, project: Path | None = None) -> None:
    """Let a version compute requests that are answered already, and compare the answers.

    Nobody gets the shadow's answers, so a version that passed no gate may be one.

    Example: minga traffic shadow machine-failure @challenger --share 0.2

    Args:
        model: The model, which `minga serve` serves.
        version: The version: its number, or @ALIAS.
        share: The part of the requests that it computes too.
        project: The project folder. Without one here, MINGA_TRACKING_URI says which registry.
    """
    _ask("shadow", model, version, share, project)
    print_line("the service begins at its next look; see the report with: minga traffic status")


@app.command
def split(model: str, version: str, *, share: Share = 0.5, project: Path | None = None) -> None:
    """Let two versions answer different callers (A/B), and compare what becomes of the answers.

    A caller says who it is in the header x-minga-key, or a request parameter of that name, and
    always gets the same version. What became of its answers goes to
    POST /v2/models/NAME/outcomes as {"outcomes": [{"key": ..., "value": ...}]}; once there are
    enough, it is said which version is better.

    Example: minga traffic split machine-failure 7 --share 0.5

    Args:
        model: The model, which `minga serve` serves.
        version: The other version: its number, or @ALIAS.
        share: The part of the callers that gets it.
        project: The project folder. Without one here, MINGA_TRACKING_URI says which registry.
    """
    _ask("split", model, version, share, project)
    print_line("the service begins at its next look; see the report with: minga traffic status")


@app.command
def stop(model: str, *, project: Path | None = None) -> None:
    """End a comparison: the version from before takes all. Of one that has ended, forget it.

    Example: minga traffic stop machine-failure

    Args:
        model: The model.
        project: The project folder. Without one here, MINGA_TRACKING_URI says which registry.
    """
    from minga.serving.book import has_ended
    from minga.serving.errors import ServingError

    book = _source(project).book()
    plan, story = book.read(model)
    if plan is None and story is None:
        raise ServingError(f"nothing is compared of model '{model}'")
    if plan is None and not has_ended(story):
        raise ServingError(
            f"version {story.challenger if story else ''} takes over as the new champion of "
            f"'{model}'; to end that, promote the former champion: minga model promote"
        )
    book.plan(model, None)
    print_line(f"'{model}' is its champion's alone again, at the service's next look")


@app.command
def status(*, project: Path | None = None, json: bool = False) -> None:
    """Show what is compared, where it stands and why, and what was counted.

    Example: minga traffic status --json

    Args:
        project: The project folder. Without one here, MINGA_TRACKING_URI says which registry.
        json: Print JSON.
    """
    source = _source(project)
    book = source.book()
    rows = [row for name in source.names() if (row := _row(name, *book.read(name)))]
    if json:
        print_json(rows)
        return
    print_table(
        ("model", "mode", "version", "against", "share", "status", "since", "why"),
        [
            (
                row["model"],
                row["mode"],
                row["challenger"],
                row.get("baseline", "-"),
                f"{row['share']:.0%}",
                row["status"],
                row.get("since", "-"),
                row.get("reason", ""),
            )
            for row in rows
        ],
        empty="nothing is compared; begin with: minga traffic canary MODEL VERSION",
    )
    for row in rows:
        _print_figures(row)


def _print_figures(row: dict[str, Any]) -> None:
    figures = dict(row.get("figures", {}))
    verdict = figures.pop("verdict", None)
    for role, counted in figures.items():
        numbers = ", ".join(f"{name} {value}" for name, value in counted.items())
        print_line(f"{row['model']} version {row[role]}: {numbers}")
    if verdict:
        print_line(f"{row['model']}: {verdict}")


def _row(name: str, plan: Any, story: Any) -> dict[str, Any] | None:
    """Tell of one model: its story, or the plan that no service has taken up yet."""
    if plan is not None and (story is None or story.plan != plan.id):
        return {
            "model": name,
            "mode": plan.mode.value,
            "challenger": plan.version,
            "share": plan.share,
            "status": "asked for",
        }
    return None if story is None else {"model": name, **story.model_dump(mode="json")}


def _ask(
    mode: str,
    model: str,
    version: str,
    share: float,
    project: Path | None,
    *,
    expects: str = "baseline",
) -> None:
    from minga.inference.comparing import Mode
    from minga.serving.book import Plan
    from minga.serving.errors import NoChampionError, ServingError
    from minga.serving.judging import Expectation
    from minga.serving.referee import is_rolled_back

    source = _source(project)
    champion = source.current(model)
    if champion is None:
        raise NoChampionError(f"model '{model}' has no champion yet: `minga run` makes one")
    ref = source.version(model, version)
    if ref == champion:
        raise ServingError(f"version {ref.version} is champion already, so it answers everything")
    if mode != "shadow" and not source.is_blessed(ref):
        raise ServingError(
            f"version {ref.version} did not pass its gates, so it answers nobody; "
            f"see why with: minga model show {ref.version}, or try: minga traffic shadow"
        )
    book = source.book()
    _, story = book.read(model)
    if story is not None and is_rolled_back(story, champion.version):
        raise ServingError(
            f"the champion itself, version {champion.version}, did not pass as a canary "
            f"({story.reason}); `minga traffic stop {model}` lets it try again"
        )
    identity = f"{mode} {ref.version} of {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
    asked = Plan(
        id=identity,
        mode=Mode(mode),
        version=ref.version,
        share=share,
        expects=Expectation(expects),
    )
    book.plan(model, asked)
    print_line(f"asked for: {mode} of '{model}' version {ref.version} beside {champion.version}")


def _source(project: Path | None) -> "RegistrySource":
    from minga.cli.serve import configured
    from minga.serving.registry_source import RegistrySource

    config, tracking_uri = configured(project, {})
    return RegistrySource(tracking_uri, alias=config.alias)
