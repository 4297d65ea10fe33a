"""A client of the Open Inference Protocol v2 over gRPC, with the methods of `InferenceClient`.

    with GrpcClient("grpc://127.0.0.1:8001") as client:
        outputs = client.infer("machine-failure", {"input": rows})

Requests may be repeated without harm, so one that meets a server on its way out is sent again
by gRPC itself.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

import grpc

from minga.inference.credentials import Credentials
from minga.inference.errors import (
    BadRequestError,
    ClientError,
    RejectedError,
    ServerUnreachableError,
)
from minga.inference.grpc_wire import (
    EXPLANATIONS,
    SERVICE,
    STATUS_KEY,
    STATUSES,
    read_response,
    write_request,
)
from minga.inference.protocol import InferRequest, InferResponse
from minga.inference.tensors import Array
from minga.inference.v2 import open_inference_pb2 as pb

_TIMEOUT_S: Final = 30.0
_HTTP_STATUSES: Final = {code: status for status, code in STATUSES.items()}
_RETRIES: Final = 3
_FIRST_BACKOFF_MS: Final = 50
_MAX_BACKOFF_MS: Final = 5000


class GrpcClient:
    """Talks to one server; may be shared by threads.

    Args:
        url: the server, as in `grpc://127.0.0.1:8001`, or `grpcs://...` for TLS.
        timeout_s: how long one request may take.
        retries: how often a request is sent again, at most 4 times, that no server has answered.
        credentials: what the server wants to see, and whose servers are trusted.

    Raises:
        ClientError: `url` is no such URL, or the credentials are unusable or unsafe with it.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = _TIMEOUT_S,
        retries: int = _RETRIES,
        credentials: Credentials | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        shown = credentials or Credentials()
        host, target = _target_of(self._url)
        is_secure = self._url.startswith("grpcs:")
        self._metadata = tuple(shown.headers(host=host, is_secure=is_secure).items())
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # A proxy from the environment speaks HTTP/1.1, and knows no loopback.
            ("grpc.enable_http_proxy", 0),
            ("grpc.service_config", json.dumps(_service_config(retries))),
            # By default gRPC dials again after a second, by when all retries have failed.
            ("grpc.initial_reconnect_backoff_ms", _FIRST_BACKOFF_MS),
            ("grpc.max_reconnect_backoff_ms", _MAX_BACKOFF_MS),
        ]
        self._channel = (
            grpc.secure_channel(target, shown.channel_credentials(), options)
            if is_secure
            else grpc.insecure_channel(target, options)
        )

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | None = None,
        outputs: Iterable[str] = (),
    ) -> dict[str, Array]:
        """Send one inference request and give back the outputs.

        Args:
            model: the model's name.
            inputs: one array per input, of exactly the model's type.
            version: which version answers; None leaves it to the server.
            outputs: which outputs to compute; none means all.

        Raises:
            BadRequestError: an array has no form in the protocol.
            ClientError: the server cannot be reached, or refuses.
        """
        request = InferRequest.of(inputs, outputs)
        return dict(self.request(model, request, version=version).outputs)

    def explain(
        self,
        model: str,
        inputs: Mapping[str, Array],
        *,
        version: str | None = None,
        outputs: Iterable[str] = (),
        baseline: Sequence[float] | None = None,
    ) -> dict[str, Array]:
        """Ask what each feature adds to each output; see `InferenceClient.explain`.

        Raises:
            BadRequestError: an array has no form in the protocol.
            ClientError: the server cannot be reached, or refuses.
        """
        parameters = {} if baseline is None else {"baseline": [float(one) for one in baseline]}
        request = InferRequest.of(inputs, outputs, parameters=parameters)
        return dict(self.request(model, request, version=version, verb="explain").outputs)

    def request(
        self,
        model: str,
        request: InferRequest,
        *,
        version: str | None = None,
        verb: Literal["infer", "explain"] = "infer",
    ) -> InferResponse:
        """Send a request as it is, and give back the whole response with the answering version.

        Of its parameters only the `baseline` of an explanation is sent.

        Raises:
            BadRequestError: an array has no form in the protocol.
            ClientError: the server cannot be reached, or refuses.
        """
        message = write_request(model, version, request)
        if verb == "explain":
            baseline = request.parameters.get("baseline", ())
            asked = pb.ModelExplainRequest(request=message, baseline=baseline)
            answer = self._call("ModelExplain", asked, pb.ModelExplainResponse, EXPLANATIONS)
            response = answer.attributions
        else:
            response = self._call("ModelInfer", message, pb.ModelInferResponse)
        try:
            return read_response(response)
        except BadRequestError as error:
            raise ClientError(
                f"{self._url} does not answer in the Open Inference Protocol: {error}"
            ) from error

    def models(self) -> tuple[str, ...]:
        """Name the models that the server answers for.

        Raises:
            ClientError: the server cannot be reached, or refuses.
        """
        request = pb.RepositoryIndexRequest(ready=True)
        response = self._call("RepositoryIndex", request, pb.RepositoryIndexResponse)
        return tuple(dict.fromkeys(entry.name for entry in response.models))

    def metadata(self, model: str, *, version: str | None = None) -> dict[str, Any]:
        """Give a model's versions, inputs and outputs as `InferenceClient.metadata` does.

        Raises:
            ClientError: the server cannot be reached, or refuses.
        """
        request = pb.ModelMetadataRequest(name=model, version=version or "")
        response = self._call("ModelMetadata", request, pb.ModelMetadataResponse)
        return {
            "name": response.name,
            "versions": list(response.versions),
            "platform": response.platform,
            "inputs": [_spec(spec) for spec in response.inputs],
            "outputs": [_spec(spec) for spec in response.outputs],
        }

    def ready(self, model: str | None = None) -> bool:
        """Tell whether the server, or one model of it, answers requests now."""
        try:
            if model is None:
                answer = self._call("ServerReady", pb.ServerReadyRequest(), pb.ServerReadyResponse)
            else:
                request = pb.ModelReadyRequest(name=model)
                answer = self._call("ModelReady", request, pb.ModelReadyResponse)
        except ClientError:
            return False
        return bool(answer.ready)

    def close(self) -> None:
        """Close the connections."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, request: Any, answer: Any, service: str = SERVICE) -> Any:
        call = self._channel.unary_unary(
            f"/{service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return call(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _translated(self._url, error) from error


def _service_config(retries: int) -> dict[str, Any]:
    """Tell gRPC which calls it sends again, and when."""
    if not retries:
        return {}
    policy = {
        "maxAttempts": retries + 1,
        "initialBackoff": f"{_FIRST_BACKOFF_MS / 1000}s",
        "maxBackoff": "1s",
        "backoffMultiplier": 3,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    services = [{"service": SERVICE}, {"service": EXPLANATIONS}]
    return {"methodConfig": [{"name": services, "retryPolicy": policy}]}


def _translated(url: str, error: Any) -> ClientError:
    """Tell a server that refuses from one that is not there."""
    trailers = dict(error.trailing_metadata() or ())
    status = trailers.get(STATUS_KEY)
    unreachable = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    if status is None and error.code() in unreachable:
        return ServerUnreachableError(
            f"no inference server answers at {url} ({error.details()}): "
            "is `minga serve --grpc-port` running, and is the URL right?"
        )
    return RejectedError(
        str(error.details()), status=int(status or _HTTP_STATUSES.get(error.code(), 500))
    )


def _target_of(url: str) -> tuple[str, str]:
    """Give a URL's host, and what gRPC dials."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or port is None or parts.scheme not in ("grpc", "grpcs"):
        raise ClientError(f"{url!r} is no gRPC server's URL; write one like grpc://127.0.0.1:8001")
    return host, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _spec(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
