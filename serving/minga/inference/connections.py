"""What one connection may cost, whoever is at its other end.

uvicorn bounds neither how long a request's headers may take nor how long they may be, and it
keeps an answer for a caller who does not read it. `guarded` adds to uvicorn's protocol:

- A request's headers come within `_HEADERS_S` of the connection or of their first byte, and
  within `_MAX_HEADER_BYTES`; else the connection is closed (431 for their length).
- A caller who does not read has `_UNREAD_S` from when its answers fill the server's buffer, or
  from the end of one that does not; then what is left is thrown away with the connection.
- Over a number of connections a new one is told 503 and closed.
- Where it is said how old a connection may get, an older one ends with its next answer.

It also tells the application of a verified client certificate, by ASGI's TLS extension.
"""

import random
from asyncio import TimerHandle
from functools import cache
from typing import Any, Final

_HEADERS_S: Final = 30
_UNREAD_S: Final = 60
_MAX_HEADER_BYTES: Final = 128 * 1024  # twice what the application takes: its answer is better

_REFUSALS: Final = {
    431: (b"431 Request Header Fields Too Large", b"the headers are over the limit"),
    503: (b"503 Service Unavailable", b"too many connections; try again shortly"),
}


@cache
def guarded(
    protocol: type[Any], *, max_connections: int, max_age_s: float | None = None
) -> type[Any]:
    """Give a kind of uvicorn's httptools protocol whose connections keep these bounds.

    Args:
        protocol: uvicorn's.
        max_connections: how many there may be at once.
        max_age_s: how old connections get, on the mean; None means any age.
    """
    bounds = {"_max_connections": max_connections, "_max_age_s": max_age_s}
    return type(f"Guarded{protocol.__name__}", (_Guard, protocol), bounds)


class _Guard:
    """Mixed in before a protocol of uvicorn, whose attributes it reads."""

    connections: set[Any]
    cycle: Any
    loop: Any
    scope: Any
    transport: Any
    _patience: TimerHandle | None = None  # for the caller's headers
    _reader_patience: TimerHandle | None = None  # for the caller to read
    _in_headers = False
    _num_header_bytes = 0
    _client: str | None = None  # the certificate's name
    _max_connections: int
    _max_age_s: float | None
    _ends_at: float | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)  # type: ignore[misc]
        self._client = _certified(transport)
        if self._max_age_s is not None:
            part = random.uniform(0.5, 1.5)  # noqa: S311 - so that not all end at once
            self._ends_at = self.loop.time() + part * self._max_age_s
        if len(self.connections) > self._max_connections:
            self._refuse(503)
        else:
            self._lose_patience_after(_HEADERS_S)

    def connection_lost(self, error: Exception | None) -> None:
        self._be_patient()
        self._be_patient_with_reader()
        super().connection_lost(error)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)  # type: ignore[misc]
        if self.cycle is not None and not self.cycle.response_complete:
            self._be_patient()
        elif self._patience is None:
            self._lose_patience_after(_HEADERS_S)
        if self._in_headers:
            self._num_header_bytes += len(data)
            if self._num_header_bytes > _MAX_HEADER_BYTES:
                self._refuse(431)

    def on_message_begin(self) -> None:
        self._in_headers = True
        self._num_header_bytes = 0
        super().on_message_begin()  # type: ignore[misc]
        if self._client is not None:
            self.scope["extensions"] = {"tls": {"client_cert_name": self._client}}

    def on_headers_complete(self) -> None:
        self._in_headers = False
        super().on_headers_complete()  # type: ignore[misc]
        if self._ends_at is not None and self.loop.time() > self._ends_at:
            self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

    def on_response_complete(self) -> None:
        super().on_response_complete()  # type: ignore[misc]
        if self.transport.get_write_buffer_size():
            self.loop.call_later(_UNREAD_S, self._forget_answer, self.cycle)

    # A full buffer is bounded here and not at an answer's end: the application that gives up has
    # uvicorn close the connection, and a close waits, without a bound, for the buffer to empty.
    def pause_writing(self) -> None:
        super().pause_writing()  # type: ignore[misc]
        self._reader_patience = self.loop.call_later(_UNREAD_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()  # type: ignore[misc]
        self._be_patient_with_reader()

    def _lose_patience_after(self, seconds: float) -> None:
        self._patience = self.loop.call_later(seconds, self.transport.abort)

    def _be_patient(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _be_patient_with_reader(self) -> None:
        if self._reader_patience is not None:
            self._reader_patience.cancel()
            self._reader_patience = None

    def _forget_answer(self, cycle: Any) -> None:
        if self.cycle is cycle and self.transport.get_write_buffer_size():
            self.transport.abort()

    def _refuse(self, status: int) -> None:
        line, words = _REFUSALS[status]
        body = b'{"error":"' + words + b'"}'
        self.transport.write(
            b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n%b" % (line, len(body), body)
        )
        self.transport.close()


def _certified(transport: Any) -> str | None:
    """Give the subject of a certificate that TLS has verified; None if none was shown."""
    connection = transport.get_extra_info("ssl_object")
    certificate = connection.getpeercert() if connection is not None else None
    if not certificate:
        return None
    subject = certificate.get("subject", ())
    return ",".join(f"{name}={value}" for part in subject for name, value in part)
