"""What can go wrong with inference, and the HTTP status that says so (`grpc_wire` has gRPC's).

```
InferenceError
├── RequestError                the caller must change the request
│   ├── BadRequestError         400  malformed, or does not fit the model (also a ValueError)
│   ├── UnauthenticatedError    401  no key that counts
│   ├── ForbiddenError          403  this server does not grant it to anyone, or not to this key
│   ├── UnknownModelError       404  no such model or version
│   ├── UnknownPathError        404  no such path
│   ├── MethodNotAllowedError   405  the path knows other methods
│   ├── SlowCallerError         408  the body did not arrive in time
│   ├── TooLargeError           413  the body is over the limit
│   ├── UnsupportedCodingError  415  a content coding other than gzip and deflate
│   └── HeadersTooLargeError    431  the headers are over the limit
├── UnavailableError            503  the same request may succeed later: nothing is loaded yet
│   ├── AsleepError             503  or the model has to be loaded first
│   ├── OverloadedError         503  or there is more to do than can be done in time
│   └── RateLimitedError        429  or the key has made its requests for now
├── ModelError                  a model cannot be loaded or fails its self-test
├── MonitorError                what the monitor remembers cannot be used
├── PortInUseError              the server's port is taken
├── AccessError                 the server would not be protected, or its keys or TLS are unusable
└── ClientError                 what the client of a server meets
    ├── ServerUnreachableError  nobody answers at the URL
    └── RejectedError           the server answered with an error, whose status it keeps
```
"""


class InferenceError(Exception):
    """The root of everything that `minga.inference` raises on purpose."""

    status = 500


class RequestError(InferenceError):
    """A request that no retry will make right."""

    status = 400


class BadRequestError(RequestError, ValueError):
    """A request that is malformed or does not fit the model."""


class UnauthenticatedError(RequestError):
    """A request without an API key that counts, to a server that wants one."""

    status = 401


class ForbiddenError(RequestError):
    """Something that this server was not told to let its callers, or this key, do."""

    status = 403


class UnknownModelError(RequestError, LookupError):
    """A model, or a version of it, that is not served here."""

    status = 404


class UnknownPathError(RequestError):
    """A path that the protocol does not know."""

    status = 404


class MethodNotAllowedError(RequestError):
    """A known path with the wrong method.

    Args:
        message: what was asked for.
        allowed: the methods that the path answers, as the `Allow` header lists them.
    """

    status = 405

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class SlowCallerError(RequestError):
    """A body that did not arrive in the time that the server waits for one."""

    status = 408


class TooLargeError(RequestError):
    """A body over the server's limit, on the wire or after decompression."""

    status = 413


class UnsupportedCodingError(RequestError):
    """A body in a content coding that is neither gzip nor deflate."""

    status = 415


class HeadersTooLargeError(RequestError):
    """Headers over the server's limit."""

    status = 431


class UnavailableError(InferenceError):
    """The server runs but cannot answer now, as when it has no model yet."""

    status = 503
    retry_after_s = 1.0


class AsleepError(UnavailableError):
    """A model that answers, and is not in memory at the moment."""


class OverloadedError(UnavailableError):
    """More is asked than can be answered: in the memory, or in the time that is granted.

    Args:
        message: what there is too much of.
        retry_after_s: after how many seconds it should be less.
    """

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RateLimitedError(UnavailableError):
    """A key has made the requests that it may make for now.

    Args:
        message: which limit that is.
        retry_after_s: when the next request will be let in.
    """

    status = 429

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(InferenceError):
    """A model that cannot be served: missing, altered, unreadable, or failing its self-test."""


class MonitorError(InferenceError):
    """What the monitor remembers cannot be read or written, or labels fit nothing that it knows."""


class PortInUseError(InferenceError):
    """The address that the server was told to listen on is taken."""


class AccessError(InferenceError):
    """A server that would not be protected as it has to be, or whose keys or TLS are unusable."""


class ClientError(InferenceError):
    """The root of what a client of an inference server meets."""


class ServerUnreachableError(ClientError):
    """Nobody answers at the server's URL, or the connection broke."""


class RejectedError(ClientError):
    """The server answered with an error.

    Args:
        message: the server's own words.
        status: its HTTP status.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status
