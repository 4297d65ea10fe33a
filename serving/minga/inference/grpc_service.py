"""The Open Inference Protocol v2 over gRPC, on the service that answers HTTP too.

Requests are parsed here and not by gRPC, so that bytes that are no message are the caller's
error (INVALID_ARGUMENT) with a reason, and long messages are parsed beside the event loop.
"""

import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from minga.inference.access import Access
from minga.inference.engine import PLATFORM, OnnxModel
from minga.inference.errors import BadRequestError, InferenceError, UnavailableError
from minga.inference.grpc_wire import (
    EXPLANATIONS,
    OUTCOMES,
    SERVICE,
    STATUS_KEY,
    read_request,
    status_of,
    write_response,
    write_statistics,
)
from minga.inference.keys import Permission
from minga.inference.limits import Limits
from minga.inference.protocol import InferRequest, InferResponse
from minga.inference.service import EXTENSIONS, SERVER_NAME, InferenceService, server_version
from minga.inference.tensors import TensorSpec
from minga.inference.v2 import open_inference_pb2 as pb

_LOG: Final = logging.getLogger(__name__)
_MAX_REPORT_BYTES: Final = 1024 * 1024  # of outcomes, as over HTTP

# What is not here needs leave to ask.
_PERMISSIONS: Final[dict[str, Permission | None]] = {
    "ServerLive": None,
    "ServerReady": None,
    "ModelStatistics": Permission.WATCH,
    "RepositoryModelLoad": Permission.MANAGE,
    "RepositoryModelUnload": Permission.MANAGE,
}

Context = grpc.aio.ServicerContext[bytes, bytes]


class GrpcService:
    """The protocol's methods; each takes a message and gives one, or raises an `InferenceError`.

    Args:
        service: what answers.

    Attributes:
        num_requests: how many have begun, and their answers have not gone.
    """

    def __init__(self, service: InferenceService) -> None:
        self._service = service
        self.num_requests = 0

    def handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        """Give the methods as a server takes them, by service."""
        methods: dict[str, tuple[Any, Callable[[Any], Awaitable[Any]]]] = {
            "ServerLive": (pb.ServerLiveRequest, self.server_live),
            "ServerReady": (pb.ServerReadyRequest, self.server_ready),
            "ModelReady": (pb.ModelReadyRequest, self.model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self.server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self.model_metadata),
            "ModelInfer": (pb.ModelInferRequest, self.model_infer),
            "ModelStatistics": (pb.ModelStatisticsRequest, self.model_statistics),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self.repository_index),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, self.load),
            "RepositoryModelUnload": (pb.RepositoryModelUnloadRequest, self.unload),
        }
        outcomes: dict[str, tuple[Any, Callable[[Any], Awaitable[Any]]]] = {
            "ReportOutcomes": (pb.ReportOutcomesRequest, self.report_outcomes),
        }
        explanations: dict[str, tuple[Any, Callable[[Any], Awaitable[Any]]]] = {
            "ModelExplain": (pb.ModelExplainRequest, self.model_explain),
        }
        services = {SERVICE: methods, OUTCOMES: outcomes, EXPLANATIONS: explanations}
        return tuple(
            grpc.method_handlers_generic_handler(
                service,
                {
                    name: grpc.unary_unary_rpc_method_handler(self._behaviour(kind, method))
                    for name, (kind, method) in offered.items()
                },
            )
            for service, offered in services.items()
        )

    def _behaviour(self, kind: Any, method: Callable[[Any], Awaitable[Any]]) -> Any:
        """Make what gRPC calls: bytes in, bytes out, errors as statuses."""

        async def answer(data: bytes, context: Context) -> bytes:
            share = self._service.share()
            self.num_requests += 1

            def gone(*_: Any) -> None:
                self.num_requests -= 1
                share.give_back()

            # The stubs want another context than they give.
            context.add_done_callback(gone)  # type: ignore[arg-type]
            try:
                share.take(len(data))
                message = await self._service.beside(len(data), _parse, kind, data)
                response: bytes = (await method(message)).SerializeToString()
                share.take(len(response))
            except InferenceError as error:
                await _refuse(context, error)
            except Exception as error:
                if isinstance(error, grpc.aio.AbortError):
                    raise
                _LOG.exception("unexpected error in %s", kind.DESCRIPTOR.name)
                words = "internal error; the server's log has the details"
                await context.abort(grpc.StatusCode.INTERNAL, words)
            return response

        return answer

    async def server_live(self, _: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """Say that the server runs."""
        return pb.ServerLiveResponse(live=True)

    async def server_ready(self, _: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """Say whether there are models."""
        return pb.ServerReadyResponse(ready=self._service.repository.is_ready)

    async def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """Say whether a model answers; an unknown one does not, which is no error."""
        try:
            self._service.repository.find(request.name, request.version or None)
        except InferenceError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def server_metadata(self, _: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """Say what the server is."""
        return pb.ServerMetadataResponse(
            name=SERVER_NAME, version=server_version(), extensions=EXTENSIONS
        )

    async def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """Say what a model takes and gives."""
        model = await self._service.model(request.name, request.version or None)
        return pb.ModelMetadataResponse(
            name=model.ref.name,
            versions=self._service.repository.versions(model.ref.name),
            platform=PLATFORM,
            inputs=[_spec(spec) for spec in model.inputs],
            outputs=[_spec(spec) for spec in model.outputs],
        )

    async def model_infer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
        """Give a model's outputs."""
        call = _GrpcCall(request)
        return await self._service.infer(request.model_name, request.model_version or None, call)

    async def model_explain(self, request: pb.ModelExplainRequest) -> pb.ModelExplainResponse:
        """Say what each feature adds to a model's outputs."""
        asked = request.request
        call = _ExplainCall(asked, list(request.baseline))
        name, version = asked.model_name, asked.model_version or None
        return pb.ModelExplainResponse(
            attributions=await self._service.explain(name, version, call)
        )

    async def model_statistics(
        self, request: pb.ModelStatisticsRequest
    ) -> pb.ModelStatisticsResponse:
        """Say what versions have done."""
        return write_statistics(
            self._service.statistics(request.name or None, request.version or None)
        )

    async def repository_index(
        self, request: pb.RepositoryIndexRequest
    ) -> pb.RepositoryIndexResponse:
        """List the declared versions."""
        index = self._service.index(only_ready=request.ready)
        return pb.RepositoryIndexResponse(
            models=[pb.RepositoryIndexResponse.ModelIndex(**entry) for entry in index]
        )

    async def report_outcomes(self, request: pb.ReportOutcomesRequest) -> pb.ReportOutcomesResponse:
        """Count outcomes for the versions that gave the answers."""
        if request.ByteSize() > _MAX_REPORT_BYTES:
            raise BadRequestError("a report may be 1 MB long; send several")
        outcomes = [(one.key, one.value) for one in request.outcomes]
        counted = self._service.report_outcomes(request.model_name, outcomes)
        return pb.ReportOutcomesResponse(counted=counted)

    async def load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """Let an unloaded model answer again."""
        if request.parameters:
            raise BadRequestError("a model is loaded as it is declared; it takes no parameters")
        await self._service.load(request.model_name)
        return pb.RepositoryModelLoadResponse()

    async def unload(
        self, request: pb.RepositoryModelUnloadRequest
    ) -> pb.RepositoryModelUnloadResponse:
        """Let a model answer no more."""
        await self._service.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse()


class _GrpcCall:
    """An inference request over gRPC, a `service.Call`."""

    def __init__(self, message: pb.ModelInferRequest) -> None:
        self._message = message

    async def receive(self, _limits: Limits) -> int:
        """Tell the size; gRPC has held it to the limit."""
        return self._message.ByteSize()

    def decode(self, _model: OnnxModel) -> InferRequest:
        """Read the tensors."""
        return read_request(self._message)

    def header(self, name: str) -> str | None:
        """Give a parameter of the request, which is where gRPC has them."""
        parameters = self._message.parameters
        if name not in parameters:
            return None
        parameter = parameters[name]
        kind = parameter.WhichOneof("parameter_choice")
        return None if kind is None else str(getattr(parameter, kind))

    def encode(self, response: InferResponse, _request: InferRequest) -> pb.ModelInferResponse:
        """Write the tensors."""
        return write_response(response)


class _ExplainCall(_GrpcCall):
    """A request for an explanation; its baseline is a field, since no parameter is a list."""

    def __init__(self, message: pb.ModelInferRequest, baseline: list[float]) -> None:
        super().__init__(message)
        self._baseline = baseline

    def decode(self, model: OnnxModel) -> InferRequest:
        """Read the tensors and the baseline."""
        request = super().decode(model)
        return replace(request, parameters={"baseline": self._baseline} if self._baseline else {})


def _parse(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise BadRequestError(f"the request is no {kind.DESCRIPTOR.name}: {error}") from None


def _spec(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=spec.name, datatype=spec.datatype, shape=spec.shape
    )


async def _refuse(context: Any, error: InferenceError) -> None:
    trailers = [(STATUS_KEY, str(error.status))]
    if isinstance(error, UnavailableError):
        trailers.append(("retry-after", str(max(1, math.ceil(error.retry_after_s)))))
        # Clients that ask again by themselves where nobody answers shall not add to the crowd.
        trailers.append(("grpc-retry-pushback-ms", "-1"))
    await context.abort(status_of(error), str(error), tuple(trailers))


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Refuses calls before their messages are received, so that strangers cannot fill the memory.

    Args:
        access: who is let in.
        certified: whether every connection has shown a certificate that was verified.
    """

    def __init__(self, access: Access, *, certified: bool) -> None:
        self._access = access
        self._certified = certified

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Let a call through, or give what refuses it."""
        method = handler_call_details.method.rpartition("/")[2]
        permission = _PERMISSIONS.get(method, Permission.ASK)
        metadata = dict(handler_call_details.invocation_metadata or ())
        try:
            if permission is not None:
                self._access.admit(
                    permission, metadata.get("authorization"), certified=self._certified
                )
        except InferenceError as error:
            return _refusal(error)
        return await continuation(handler_call_details)


def _refusal(error: InferenceError) -> Any:
    """Make a method that refuses; one that takes a stream need not receive any of it."""

    async def refuse(_: Any, context: Any) -> None:
        await _refuse(context, error)

    return grpc.stream_unary_rpc_method_handler(refuse)
