"""Bodies under limits of size, time and memory: read, inflated, and deflated on the way back."""

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from typing import Any, Final, Generic, Self, TypeVar

from minga.inference.errors import (
    BadRequestError,
    OverloadedError,
    SlowCallerError,
    TooLargeError,
    UnsupportedCodingError,
)
from minga.inference.limits import Limits

T = TypeVar("T")
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_MAX_DIGITS: Final = 18  # more only means larger still, and int() refuses thousands of them
MOST_INFLATED: Final = 1032
"""Bytes that a byte of a deflated body may become (zlib's documentation)."""
_ZLIB_OR_GZIP: Final = 32 + zlib.MAX_WBITS
_DEFLATERS: Final = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}
_WORTH_BYTES: Final = 4096  # below it a packet or two are saved, and the time is lost
_CODINGS: Final = (b"gzip", b"x-gzip", b"deflate")


class DisconnectedError(Exception):
    """The caller went away before its body was complete; there is nobody to answer."""


class Budget:
    """The memory that requests and answers together may take. For one event loop.

    Args:
        max_bytes: how much that is.
    """

    def __init__(self, max_bytes: int) -> None:
        self._left = max_bytes

    def share(self) -> "Share":
        """Give a request's part of it, empty as yet; a context manager that gives it back."""
        return Share(self)

    def take(self, num_bytes: int) -> None:
        """Set memory aside.

        Raises:
            OverloadedError: there is not so much left.
        """
        if num_bytes > self._left:
            raise OverloadedError(
                "the requests that are being answered take all the memory that they may; "
                "try again shortly"
            )
        self._left -= num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Give back what was set aside."""
        self._left += num_bytes


class Share:
    """One request's part of a budget."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._taken = 0

    def take(self, num_bytes: int) -> None:
        """Set memory aside until the end of the request.

        Raises:
            OverloadedError: there is not so much left.
        """
        self._budget.take(num_bytes)
        self._taken += num_bytes

    def give_back(self, _: object = None) -> None:
        """Give back all of it; also what gRPC calls at the end of a request."""
        self._budget.give_back(self._taken)
        self._taken = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()


async def read_body(
    receive: Receive, *, announced: bytes | None, limits: Limits, share: Share
) -> bytes:
    """Read a whole body, giving up as soon as it is known to be over a limit.

    Args:
        receive: ASGI's source of messages.
        announced: the `Content-Length` header, if there is one.
        limits: how long it may be, and how long it may take.
        share: what its memory is taken from.

    Raises:
        TooLargeError: the body is longer than it may be.
        SlowCallerError: it is not complete in time.
        OverloadedError: too many bytes of other requests are in memory.
        DisconnectedError: the caller went away.
    """
    try:
        reading = _read(receive, announced, limits.max_body_bytes, share)
        return await _within(limits.body_timeout_s, reading)
    except TimeoutError:
        raise SlowCallerError(
            f"the body did not arrive within {limits.body_timeout_s:g} s"
        ) from None


async def _within(seconds: float, waiting: Awaitable[T]) -> T:
    """Wait for something, but not longer than some seconds.

    The clock is set only where there is anything to wait for. Most bodies have come whole when they
    are asked for, and a clock for each took a tenth of a small request's time.
    """
    steps = waiting.__await__()
    try:
        first = next(steps)
    except StopIteration as done:
        result: T = done.value
        return result
    async with asyncio.timeout(seconds):
        return await _Begun(first, steps)


class _Begun(Generic[T]):
    """What is left of something awaited: what its first step waits for, and the steps after."""

    def __init__(self, first: Any, steps: Generator[Any, Any, T]) -> None:
        self._first = first
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, T]:
        try:
            yield self._first
        except BaseException as error:
            self._steps.throw(error)
            raise
        return (yield from self._steps)


async def _read(receive: Receive, announced: bytes | None, max_bytes: int, share: Share) -> bytes:
    if announced is not None and announced.isdigit() and int(announced[:_MAX_DIGITS]) > max_bytes:
        raise _too_large(max_bytes)
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        share.take(len(chunk))
        chunks.append(chunk)
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def decompress(body: bytes, coding: bytes, *, max_bytes: int) -> bytes:
    """Undo a body's content coding.

    Args:
        body: the body as it came.
        coding: the `Content-Encoding` header; empty and `identity` mean none.
        max_bytes: the limit of the result, held while inflating, so a bomb costs no memory.

    Raises:
        UnsupportedCodingError: another coding than gzip or deflate, or several of them.
        BadRequestError: the body is not in the coding.
        TooLargeError: the result is longer than `max_bytes`.
    """
    coding = coding.strip().lower()
    if coding in (b"", b"identity"):
        return body
    if coding not in _CODINGS:
        raise UnsupportedCodingError(
            f"content coding {coding.decode('latin-1')!r} is not supported; "
            "use gzip, deflate or none"
        )
    inflater = zlib.decompressobj(_window_bits(body, coding))
    try:
        plain = inflater.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise BadRequestError(f"the body is not {coding.decode()}: {error}") from None
    if len(plain) > max_bytes:
        raise _too_large(max_bytes)
    if not inflater.eof or inflater.unused_data:
        raise BadRequestError(f"the body is not one complete {coding.decode()} stream")
    return plain


def _window_bits(body: bytes, coding: bytes) -> int:
    """Tell zlib the container: RFC 9110 deflate is zlib's, yet some clients send it bare."""
    is_zlib = len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0
    return -zlib.MAX_WBITS if coding == b"deflate" and not is_zlib else _ZLIB_OR_GZIP


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the body is over this server's limit of {max_bytes} bytes")


def compress(body: bytes, accepted: bytes) -> tuple[bytes, bytes]:
    """Deflate a long body for a caller that takes it.

    Args:
        body: the body.
        accepted: the `Accept-Encoding` header; empty means nothing is.

    Returns:
        The body, and its content coding; empty where it went unchanged.
    """
    if not accepted or len(body) < _WORTH_BYTES:
        return body, b""
    wanted = _accepted(accepted)
    for coding, window_bits in _DEFLATERS.items():
        if coding in wanted:
            deflater = zlib.compressobj(level=1, wbits=window_bits)
            return deflater.compress(body) + deflater.flush(), coding
    return body, b""


def _accepted(header: bytes) -> set[bytes]:
    """Read which codings a caller takes (RFC 9110, section 12.5.3); `*` is not taken up."""
    codings = set()
    for entry in header.lower().split(b","):
        coding, _, parameter = entry.partition(b";")
        weight = parameter.replace(b" ", b"").removeprefix(b"q=").rstrip(b"0")
        if weight not in (b"0.", b"") or not parameter:
            codings.add(coding.strip())
    return codings
