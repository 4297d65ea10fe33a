"""Where Alertmanager's webhook is received.

    POST /alerts    a message of version 4, with the token as bearer; 200 once it is in the journal
    GET  /health    200 while this answers
    GET  /metrics   for Prometheus

Alertmanager sends again whatever was not answered with 2xx, and what still fires from time to time:
the journal knows alarms by fingerprint, so that changes nothing. Who does not know the token learns
nothing, and a body is read only after it was shown.
"""

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import orjson
from prometheus_client import generate_latest

from minga.cluster.response.alarms import Alarm, AlarmError, read_webhook
from minga.cluster.response.metrics import Metrics
from minga.federation.durable import PRIVATE, create_file
from minga.inference.bodies import Budget, DisconnectedError, read_body
from minga.inference.errors import InferenceError
from minga.inference.limits import Limits
from minga.inference.metrics import CONTENT_TYPE

TOKEN_FILE: Final = "token"  # noqa: S105 - a name
_LIMITS: Final = Limits(max_body_bytes=1024 * 1024, body_timeout_s=10)
_PENDING_BYTES: Final = 8 * 1024 * 1024
_TOKEN_BYTES: Final = 32

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Hear = Callable[[tuple[Alarm, ...]], Awaitable[int]]


def token_of(folder: Path) -> str:
    """Give the token that the webhook shows; it is made the first time, for its owner alone."""
    file = folder / TOKEN_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        with suppress(FileExistsError):  # another process was faster
            create_file(file, secrets.token_urlsafe(_TOKEN_BYTES).encode(), mode=PRIVATE)
    return file.read_text(encoding="ascii").strip()


class _RefusedError(Exception):
    """The request is answered with a status above 399."""

    def __init__(self, status: int, message: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Receiver:
    """A plain ASGI application.

    Args:
        token: what a caller has to show.
        hear: takes alarms in, durably; gives how many of them may act.
        metrics: where messages are counted.
    """

    def __init__(self, token: str, hear: Hear, metrics: Metrics) -> None:
        self._token = token.encode()
        self._hear = hear
        self._metrics = metrics
        self._budget = Budget(_PENDING_BYTES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection's lifespan or one request."""
        if scope["type"] == "lifespan":
            while (await receive())["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1003})
            return
        try:
            status, body, headers = await self._route(scope, receive)
        except _RefusedError as error:
            status, headers = error.status, ((b"content-type", b"application/json"), *error.headers)
            body = orjson.dumps({"error": str(error)})
        except InferenceError as error:  # of the body: too long, too slow, too many at once
            status, headers = error.status, ((b"content-type", b"application/json"),)
            body = orjson.dumps({"error": str(error)})
        except DisconnectedError:
            return
        if scope["path"] == "/alerts":
            self._metrics.messages.labels(status=str(status)).inc()
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [*headers, length]})
        await send({"type": "http.response.body", "body": body})

    async def _route(
        self, scope: Scope, receive: Receive
    ) -> tuple[int, bytes, tuple[tuple[bytes, bytes], ...]]:
        json = ((b"content-type", b"application/json"),)
        match scope["path"], scope["method"]:
            case "/alerts", "POST":
                return 200, orjson.dumps(await self._take(scope, receive)), json
            case "/health", "GET":
                return 200, b"{}", json
            case "/metrics", "GET":
                text = ((b"content-type", CONTENT_TYPE.encode()),)
                return 200, generate_latest(self._metrics.registry), text
            case ("/alerts" | "/health" | "/metrics") as path, _:
                allowed = b"POST" if path == "/alerts" else b"GET"
                raise _RefusedError(405, f"{path} answers {allowed.decode()}", (b"allow", allowed))
        raise _RefusedError(404, "there is nothing here; alerts go to /alerts")

    async def _take(self, scope: Scope, receive: Receive) -> dict[str, int]:
        headers = dict(scope["headers"])
        scheme, _, shown = headers.get(b"authorization", b"").partition(b" ")
        is_known = hmac.compare_digest(shown.strip(), self._token)
        if scheme.lower() != b"bearer" or not is_known:
            raise _RefusedError(
                401, "the bearer token is missing or another one", (b"www-authenticate", b"Bearer")
            )
        with self._budget.share() as share:
            body = await read_body(
                receive, announced=headers.get(b"content-length"), limits=_LIMITS, share=share
            )
            try:
                alarms = read_webhook(body)
            except AlarmError as error:
                raise _RefusedError(400, f"no message of Alertmanager: {error}") from None
            return {"heard": len(alarms), "kept": await self._hear(alarms)}
