"""A client of the Open Inference Protocol v2 over HTTP, for arrays instead of bodies.

    outputs = infer("http://127.0.0.1:8000", "machine-failure", {"input": rows})

Many requests to one server go through one `InferenceClient`, which keeps its connections.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Self
from urllib.parse import quote

import httpx

from minga.inference.credentials import Credentials, is_loopback
from minga.inference.errors import (
    ClientError,
    RejectedError,
    ServerUnreachableError,
)
from minga.inference.protocol import (
    JSON_SIZE_HEADER,
    InferRequest,
    InferResponse,
    Message,
    decode_response,
    encode_request,
)
from minga.inference.tensors import Array

_TIMEOUT_S: Final = 30.0
_PAUSES_S: Final = (0.05, 0.1, 0.2, 0.4, 0.8)
_RETRIES: Final = 3  # as many pauses: a third of a second in all


class InferenceClient:
    """Talks to one server; may be shared by threads.

    Args:
        url: the server, as in `http://127.0.0.1:8000`.
        timeout_s: how long one request may take.
        retries: how often a request is sent again that no server has answered: the connection
            broke, or a proxy says that what is behind it is gone. Inference changes nothing, so
            that is always safe; what a server refuses is never sent again.
        transport: what carries the requests, by default the network.
        credentials: what the server wants to see, and whose servers are trusted.

    Raises:
        ClientError: `url` is no URL, or the credentials are unusable or unsafe with it.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = _TIMEOUT_S,
        retries: int = _RETRIES,
        transport: httpx.BaseTransport | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._retries = retries
        shown = credentials or Credentials()
        host, is_secure = _host_of(self._url), self._url.startswith("https:")
        self._http = httpx.Client(
            timeout=timeout_s,
            transport=transport,
            verify=shown.context() if is_secure else True,
            headers=shown.headers(host=host, is_secure=is_secure),
            # A proxy from the environment knows nothing of this machine's loopback.
            trust_env=not is_loopback(host),
        )

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | None = None,
        outputs: Iterable[str] = (),
        binary: bool = True,
    ) -> dict[str, Array]:
        """Send one inference request and give back the outputs.

        Args:
            model: the model's name.
            inputs: one array per input, of exactly the model's type.
            version: which version answers; None leaves it to the server.
            outputs: which outputs to compute; none means all.
            binary: send and ask for raw tensors; JSON is slower, and rounds nothing either.

        Raises:
            BadRequestError: an array has no form in the protocol.
            ClientError: the server cannot be reached, or refuses.
        """
        request = InferRequest.of(inputs, outputs, binary_outputs=binary)
        return dict(self.request(model, request, version=version, binary=binary).outputs)

    def explain(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | None = None,
        outputs: Iterable[str] = (),
        baseline: Sequence[float] | None = None,
    ) -> dict[str, Array]:
        """Ask what each feature adds to each output, by occlusion (`minga.inference.explaining`).

        Args:
            model: the model's name; it takes one table of numbers.
            inputs: the rows to explain.
            version: which version is explained; None leaves it to the server.
            outputs: which outputs are explained; none means all.
            baseline: the value of each feature that stands for its absence; None means the
                mean of the training data, where the server knows it.

        Returns:
            By output, `(rows, features, ...)`.

        Raises:
            BadRequestError: an array has no form in the protocol.
            ClientError: the server cannot be reached, or refuses.
        """
        parameters = {} if baseline is None else {"baseline": [float(one) for one in baseline]}
        request = InferRequest.of(inputs, outputs, binary_outputs=True, parameters=parameters)
        return dict(self.request(model, request, version=version, verb="explain").outputs)

    def request(
        self,
        model: str,
        request: InferRequest,
        *,
        version: str | None = None,
        binary: bool = True,
        verb: Literal["infer", "explain"] = "infer",
    ) -> InferResponse:
        """Send a request as it is, and give back the whole response with the answering version.

        Raises:
            BadRequestError: an array has no form in the protocol.
            ClientError: the server cannot be reached, or refuses.
        """
        message = encode_request(request, binary=binary)
        headers = {"content-type": "application/json"}
        if message.json_size is not None:
            headers = {
                "content-type": "application/octet-stream",
                JSON_SIZE_HEADER: str(message.json_size),
            }
        response = self._send("POST", f"{_path(model, version)}/{verb}", message.body, headers)
        size = response.headers.get(JSON_SIZE_HEADER)
        try:
            return decode_response(
                Message(body=response.content, json_size=None if size is None else int(size))
            )
        except ValueError as error:
            raise ClientError(
                f"{self._url} does not answer in the Open Inference Protocol: {error}"
            ) from error

    def models(self) -> tuple[str, ...]:
        """Name the models that the server answers for.

        Raises:
            ClientError: the server cannot be reached, or refuses.
        """
        response = self._send("GET", "/v2/models")
        try:
            return tuple(str(name) for name in response.json()["models"])
        except (ValueError, KeyError, TypeError) as error:
            raise ClientError(f"{self._url} does not list its models: {error}") from error

    def metadata(self, model: str, *, version: str | None = None) -> dict[str, Any]:
        """Give a model's versions, inputs and outputs as the protocol lists them.

        Raises:
            ClientError: the server cannot be reached, or refuses.
        """
        response = self._send("GET", _path(model, version))
        try:
            content: dict[str, Any] = response.json()
        except ValueError as error:
            raise ClientError(f"{self._url} does not answer in JSON: {error}") from error
        return content

    def ready(self, model: str | None = None) -> bool:
        """Tell whether the server, or one model of it, answers requests now."""
        path = "/v2/health/ready" if model is None else _path(model, None) + "/ready"
        try:
            self._send("GET", path)
        except ClientError:
            return False
        return True

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(
        self,
        method: str,
        path: str,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        for pause_s in (*_PAUSES_S[: self._retries], None):
            try:
                response = self._http.request(
                    method, self._url + path, content=content, headers=headers
                )
            except httpx.TransportError as error:
                if pause_s is None or isinstance(error, httpx.TimeoutException):
                    raise ServerUnreachableError(
                        f"no inference server answers at {self._url} "
                        f"({error or type(error).__name__}): "
                        "is `minga serve` running, and is the URL right?"
                    ) from error
            else:
                if response.is_success:
                    return response
                if pause_s is None or not _is_gateways(response):
                    raise RejectedError(_error_of(response), status=response.status_code)
            time.sleep(pause_s)
        raise AssertionError("the last attempt returns or raises")


def _host_of(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ClientError(f"{url!r} is no server's URL; write one like http://127.0.0.1:8000")
    return parsed.host


def _path(model: str, version: str | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return path if version is None else f"{path}/versions/{quote(version, safe='')}"


def _is_gateways(response: httpx.Response) -> bool:
    """Tell whether a proxy answered for a server that is gone, in words of its own."""
    return response.status_code >= 500 and not _own_error(response)


def _own_error(response: httpx.Response) -> str | None:
    try:
        return str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        return None


def _error_of(response: httpx.Response) -> str:
    """Find the server's own words; a proxy in between may answer in HTML."""
    own = _own_error(response)
    return own or f"the server answered {response.status_code} {response.reason_phrase}"
