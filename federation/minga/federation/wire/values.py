"""Small things: text, times, numbers and models' names on the wire."""

from collections.abc import Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from minga.federation.blobs import DIGEST_BYTES
from minga.federation.condition import Condition
from minga.federation.errors import PeerError
from minga.federation.identity import is_name
from minga.federation.limits import MAX_REASON_CHARS, MAX_VERSION_CHARS
from minga.federation.trainer import Scalar
from minga.federation.v1 import federation_pb2 as pb


def printable(text: str) -> str:
    """Make a peer's free text fit for a log, a database or a terminal: short and printable."""
    return "".join(c if c.isprintable() else "?" for c in text[:MAX_REASON_CHARS])


def timestamp(seconds: float | None) -> Timestamp | None:
    """Give a time in seconds since 1970 as it goes over the wire."""
    if seconds is None:
        return None
    moment = Timestamp()
    moment.FromDatetime(datetime.fromtimestamp(seconds, UTC))
    return moment


def config_to_wire(config: Mapping[str, Scalar]) -> dict[str, pb.Value]:
    """Write a training configuration."""
    values = {}
    for name, value in config.items():
        match value:
            case bool():
                values[name] = pb.Value(bool_value=value)
            case int():
                values[name] = pb.Value(int_value=value)
            case float():
                values[name] = pb.Value(double_value=value)
            case _:
                values[name] = pb.Value(string_value=value)
    return values


def config_from_wire(values: Mapping[str, pb.Value]) -> dict[str, Scalar]:
    """Read a training configuration."""
    config: dict[str, Scalar] = {}
    for name, value in values.items():
        kind = value.WhichOneof("kind")
        if kind is None:
            raise PeerError(f"training parameter {name!r} has no value")
        config[name] = getattr(value, kind)
    return config


def condition_to_wire(condition: Condition) -> pb.Condition:
    """Write what a device's machine is doing."""
    return pb.Condition(
        on_mains=condition.on_mains,
        idle_cpu=condition.idle_cpu,
        free_memory_bytes=condition.free_memory_bytes,
    )


def condition_from_wire(message: pb.Hello | pb.Heartbeat) -> Condition | None:
    """Read what a device says of its machine; None if it says nothing."""
    if not message.HasField("condition"):
        return None
    told = message.condition
    return Condition(
        on_mains=told.on_mains, idle_cpu=told.idle_cpu, free_memory_bytes=told.free_memory_bytes
    )


def check_model(name: str, version: str, digest: bytes) -> None:
    """Refuse a model version that no device could keep, or that no listing could show.

    Raises:
        PeerError: name, version or digest has a wrong form.
    """
    if not is_name(name):
        raise PeerError(f"{printable(name)!r} is no model name: use a-z, 0-9 and '-'")
    if not 0 < len(version) <= MAX_VERSION_CHARS or not version.isprintable() or "/" in version:
        raise PeerError(
            f"{printable(version)!r} is no version: use 1 to {MAX_VERSION_CHARS} characters, no '/'"
        )
    check_digest(digest)


def model_report(report: pb.ModelReport) -> pb.ModelReport:
    """Read what a device says of a model, fit to be stored and listed.

    Raises:
        PeerError: see `check_model`.
    """
    check_model(report.name, report.version, report.digest)
    return pb.ModelReport(
        name=report.name,
        version=report.version,
        digest=report.digest,
        state=report.state,
        detail=printable(report.detail),
    )


def check_digest(digest: bytes) -> None:
    """Refuse what is no blob's digest.

    Raises:
        PeerError: it has another length.
    """
    if len(digest) != DIGEST_BYTES:
        raise PeerError(f"a blob's digest has {DIGEST_BYTES} bytes, got {len(digest)}")
