"""Load on a server of `serving.py`: wrk over HTTP, h2load over gRPC, and what it cost the server.

Both keep a number of connections busy, each with one request at a time. They are C programs of
Debian (`apt-get install wrk nghttp2-client`), since a client in Python would be what is measured.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import psutil
from harness import RivalError

METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"
PACKAGES: Final = {"wrk": "wrk", "h2load": "nghttp2-client"}
_LUA: Final = """
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*all")
{headers}
"""
_UNITS: Final = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 60e3}
_SLACK_S: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, sent again and again.

    Attributes:
        path: where over HTTP; gRPC has its one method.
        body: what is sent; for gRPC the message.
        headers: what goes with it.
    """

    path: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What callers got, and what it cost the server.

    Attributes:
        requests_per_s: answers in a second.
        p50_ms: the median time to an answer.
        p99_ms: the time to the slowest of a hundred.
        cpu_us: processor time of all of the server's processes for one request.
    """

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


def require_clients() -> None:
    """Check that the load clients are there.

    Raises:
        RivalError: one is not.
    """
    for program, package in PACKAGES.items():
        if shutil.which(program) is None:
            raise RivalError(f"{program} is not installed: apt-get install {package}")


def over_http(
    process: psutil.Process, port: int, request: Request, *, num_callers: int, seconds: int
) -> Run:
    """Let wrk ask for a time.

    Raises:
        RivalError: an answer was no success, or none came.
    """
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "request.lua"
        body.write_bytes(request.body)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in request.headers)
        script.write_text(_LUA.format(body=body, headers=headers), encoding="utf-8")
        before = _cpu_s(process)
        said = _call(
            ["wrk", "-t1", f"-c{num_callers}", f"-d{seconds}s", "--timeout", "30s", "--latency"],
            ["-s", str(script), f"http://127.0.0.1:{port}{request.path}"],
            seconds=seconds,
        )
        cost_s = _cpu_s(process) - before
    if bad := re.search(r"Non-2xx or 3xx responses: (\d+)|Socket errors: (.*)", said):
        raise RivalError(f"wrk met {bad[0]}")
    num_requests = int(_found(r"(\d+) requests in", said)[1])
    return Run(
        requests_per_s=float(_found(r"Requests/sec:\s+([\d.]+)", said)[1]),
        p50_ms=_milliseconds(_found(r"50%\s+([\d.]+)(us|ms|s|m)", said)),
        p99_ms=_milliseconds(_found(r"99%\s+([\d.]+)(us|ms|s|m)", said)),
        cpu_us=1e6 * cost_s / num_requests,
    )


def over_grpc(
    process: psutil.Process, port: int, request: Request, *, num_callers: int, seconds: int
) -> Run:
    """Let h2load ask for a time, each connection with one call at a time.

    It does not read gRPC's own status, so whoever calls this checks an answer before.

    Raises:
        RivalError: an answer was no success, or none came.
    """
    with tempfile.TemporaryDirectory() as folder:
        body, log = Path(folder) / "body", Path(folder) / "log"
        body.write_bytes(b"\0" + len(request.body).to_bytes(4, "big") + request.body)
        before = _cpu_s(process)
        said = _call(
            ["h2load", "-t1", "-m1", f"-c{num_callers}", f"-D{seconds}"],
            ["-H", "content-type: application/grpc", "-H", "te: trailers", "-d", str(body)],
            [f"--log-file={log}", f"http://127.0.0.1:{port}{METHOD}"],
            seconds=seconds,
        )
        cost_s = _cpu_s(process) - before
        entries = [line.split("\t") for line in log.read_text(encoding="ascii").splitlines()]
    failed = [entry for entry in entries if entry[1] != "200"]
    if failed or not entries:
        raise RivalError(f"h2load met {len(failed)} failures in {len(entries)} requests")
    times_ms = sorted(int(entry[2]) / 1e3 for entry in entries)
    return Run(
        requests_per_s=float(_found(r"finished in .*?, ([\d.]+) req/s", said)[1]),
        p50_ms=times_ms[len(times_ms) // 2],
        p99_ms=times_ms[int(len(times_ms) * 0.99)],
        cpu_us=1e6 * cost_s / len(times_ms),
    )


def floats(answer: Any) -> list[float]:
    """Find the numbers of an answer, in whichever of the servers' forms it is."""
    if isinstance(answer, bytes):
        answer = orjson.loads(answer)
    if isinstance(answer, dict):
        outputs = answer.get("outputs") or answer.get("output") or answer.get("predictions")
        if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict):
            outputs = outputs[0]["data"]
        return floats(outputs)
    if isinstance(answer, list):
        return [number for part in answer for number in floats(part)]
    return [float(answer)]


def _cpu_s(process: psutil.Process) -> float:
    """Add up the processor time of a process and all that it started."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            times = one.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _call(*parts: Sequence[str], seconds: int) -> str:
    command = [word for part in parts for word in part]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=seconds + _SLACK_S
    )
    if done.returncode:
        raise RivalError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-200:]}")
    return done.stdout


def _found(pattern: str, text: str) -> re.Match[str]:
    match = re.search(pattern, text)
    if match is None:
        raise RivalError(f"a load client said nothing like {pattern!r}: {text.strip()[-200:]}")
    return match


def _milliseconds(match: re.Match[str]) -> float:
    return float(match[1]) * _UNITS[match[2]]
