"""The paths that are answered over HTTP: what routes requests and what describes them."""

from dataclasses import dataclass
from enum import Enum, auto
from functools import lru_cache
from typing import Final

from minga.inference.keys import Permission


class Operation(Enum):
    """What a path is for."""

    SERVER_METADATA = auto()
    SERVER_LIVE = auto()
    SERVER_READY = auto()
    MODEL_NAMES = auto()
    MODEL_METADATA = auto()
    MODEL_READY = auto()
    INFER = auto()
    EXPLAIN = auto()
    STATISTICS = auto()
    REPOSITORY_INDEX = auto()
    LOAD = auto()
    UNLOAD = auto()
    METRICS = auto()
    DESCRIPTION = auto()


@dataclass(frozen=True, slots=True)
class Route:
    """A path with its one method; a path that is read answers HEAD too.

    Attributes:
        operation: what it is for.
        method: GET or POST.
        template: the path, with `{model}` and `{version}` where a caller names one.
        permission: what a caller needs leave for; None means that everyone is answered.
    """

    operation: Operation
    method: str
    template: str
    permission: Permission | None = Permission.ASK

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the path answers."""
        return ("GET", "HEAD") if self.method == "GET" else (self.method,)

    @property
    def allowed(self) -> str:
        """The methods as the `Allow` header lists them."""
        return ", ".join(self.methods)


ROUTES: Final = (
    Route(Operation.INFER, "POST", "/v2/models/{model}/infer"),
    Route(Operation.INFER, "POST", "/v2/models/{model}/versions/{version}/infer"),
    Route(Operation.EXPLAIN, "POST", "/v2/models/{model}/explain"),
    Route(Operation.EXPLAIN, "POST", "/v2/models/{model}/versions/{version}/explain"),
    Route(Operation.SERVER_METADATA, "GET", "/v2"),
    Route(Operation.SERVER_METADATA, "GET", "/v2/"),
    Route(Operation.SERVER_LIVE, "GET", "/v2/health/live", None),
    Route(Operation.SERVER_READY, "GET", "/v2/health/ready", None),
    Route(Operation.MODEL_NAMES, "GET", "/v2/models"),
    Route(Operation.STATISTICS, "GET", "/v2/models/stats", Permission.WATCH),
    Route(Operation.STATISTICS, "GET", "/v2/models/{model}/stats", Permission.WATCH),
    Route(
        Operation.STATISTICS,
        "GET",
        "/v2/models/{model}/versions/{version}/stats",
        Permission.WATCH,
    ),
    Route(Operation.MODEL_METADATA, "GET", "/v2/models/{model}"),
    Route(Operation.MODEL_METADATA, "GET", "/v2/models/{model}/versions/{version}"),
    Route(Operation.MODEL_READY, "GET", "/v2/models/{model}/ready"),
    Route(Operation.MODEL_READY, "GET", "/v2/models/{model}/versions/{version}/ready"),
    Route(Operation.REPOSITORY_INDEX, "POST", "/v2/repository/index"),
    Route(Operation.LOAD, "POST", "/v2/repository/models/{model}/load", Permission.MANAGE),
    Route(Operation.UNLOAD, "POST", "/v2/repository/models/{model}/unload", Permission.MANAGE),
    Route(Operation.METRICS, "GET", "/metrics", Permission.METRICS),
    Route(Operation.DESCRIPTION, "GET", "/openapi.json"),
)
_MAX_KEPT_PATH: Final = 512  # callers choose paths, and what is kept of them must be bounded
_PARTS: Final = tuple((tuple(route.template.split("/")[1:]), route) for route in ROUTES)


@dataclass(frozen=True, slots=True)
class Match:
    """A path that was found, with the model and version that it names."""

    route: Route
    model: str | None = None
    version: str | None = None


def find(path: str) -> Match | None:
    """Find the route of a path; None if there is none."""
    return _find_kept(path) if len(path) <= _MAX_KEPT_PATH else _find(path)


def _find(path: str) -> Match | None:
    given = path.split("/")[1:]
    for parts, route in _PARTS:
        if len(parts) != len(given):
            continue
        named: dict[str, str] = {}
        for part, value in zip(parts, given, strict=True):
            if part[:1] == "{":
                named[part] = value
            elif part != value:
                break
        else:
            return Match(route, named.get("{model}"), named.get("{version}"))
    return None


_find_kept = lru_cache(maxsize=1024)(_find)
