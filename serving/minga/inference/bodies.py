"""Reading a request's body under a limit, on the wire and after decompression."""

import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from minga.inference.errors import BadRequestError, TooLargeError, UnsupportedCodingError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

_MAX_DIGITS: Final = 18  # more only means larger still, and int() refuses thousands of them
_ZLIB_OR_GZIP: Final = 32 + zlib.MAX_WBITS
_CODINGS: Final = (b"gzip", b"x-gzip", b"deflate")


class DisconnectedError(Exception):
    """The caller went away before its body was complete; there is nobody to answer."""


async def read_body(receive: Receive, *, announced: bytes | None, max_bytes: int) -> bytes:
    """Read a whole body, giving up as soon as it is known to be over the limit.

    Args:
        receive: ASGI's source of messages.
        announced: the `Content-Length` header, if there is one.
        max_bytes: the limit.

    Raises:
        TooLargeError: the body is longer than `max_bytes`.
        DisconnectedError: the caller went away.
    """
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
