"""A large fleet that waits: what it costs the coordinator, and how soon a round begins.

One coordinator process, as deployed, and many enrolled devices, each with a key, a certificate, a
mutual TLS connection and a control stream of its own; `idle_devices.py` holds them, some thousands
in a process. All have to stay connected for minutes. Then a secure round invites some of them, and
counts as begun when the coordinator has taken the signed keys of all.
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding
from harness import (
    HERE,
    Target,
    arguments,
    conclude,
    conditions,
    ending_cleanly,
    print_conditions,
    print_table,
)
from processes import start_coordinator, stop
from rivals.rounds_work import status_bytes

from minga.federation.certificates import digest_of_key
from minga.federation.coordinator.authority import AUTHORITY_FOLDER, Authority
from minga.federation.coordinator.store import DATABASE_FILE, Store
from minga.federation.identity import Role, key_to_pem, make_csr, new_key
from minga.federation.operator import Operator, connect
from minga.federation.parameters import to_bytes
from minga.federation.v1 import federation_pb2 as pb

SPARE_FILES: Final = 500
"""What a coordinator opens beside its connections."""

CONNECT_TIMEOUT_S: Final = 600.0
ROUND_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    num_devices: int
    num_processes: int
    idle_s: float
    cohort: int
    num_rounds: int


FULL: Final = Scale(num_devices=10_000, num_processes=4, idle_s=300, cohort=500, num_rounds=5)
QUICK: Final = Scale(num_devices=1_000, num_processes=2, idle_s=20, cohort=100, num_rounds=2)

KB_GOAL: Final = 100
CPU_GOAL: Final = 10
START_GOAL_S: Final = 2


class Crowd:
    """The processes that hold the devices; a context manager."""

    def __init__(self, stack: ExitStack, scale: Scale, folder: Path) -> None:
        self._processes = []
        for number in range(scale.num_processes):
            log = stack.enter_context((folder / f"devices-{number}.log").open("w"))
            process = subprocess.Popen(
                [sys.executable, "-m", "idle_devices"],
                cwd=HERE,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
            stack.callback(stop, process)
            self._processes.append(process)

    def begin(self, authority: Authority, address: str, identities: list[tuple[str, str]]) -> None:
        """Share the devices out among the processes, which connect them."""
        num = len(self._processes)
        for number, process in enumerate(self._processes):
            given = {
                "authority": authority.pinned.public_bytes(Encoding.PEM).decode(),
                "address": address,
                "identities": identities[number::num],
            }
            self._tell(process, given)

    def count(self) -> dict[str, int]:
        """Add up what the processes say of their devices."""
        for process in self._processes:
            self._tell(process, {})
        total: dict[str, int] = {}
        for process in self._processes:
            assert process.stdout is not None
            for name, value in json.loads(process.stdout.readline()).items():
                total[name] = total.get(name, 0) + value
        return total

    def _tell(self, process: subprocess.Popen[str], words: dict[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(words) + "\n")
        process.stdin.flush()


def enrol_all(state: Path, num_devices: int) -> tuple[Authority, list[tuple[str, str]]]:
    """Enrol devices as the coordinator would, without asking it ten thousand times.

    Returns:
        The authority, and each device's key and certificate, PEM.
    """
    state.mkdir(mode=0o700)
    authority = Authority.open(state / AUTHORITY_FOLDER)
    store = Store(state / DATABASE_FILE)
    identities = []
    with store.transaction():
        for number in range(num_devices):
            key, name = new_key(), f"device-{number:05}"
            certificate = authority.issue_client(Role.DEVICE, name, make_csr(key, name))
            store.register_device(name, "default", digest_of_key(key.public_key()), time.time())
            pem = certificate.public_bytes(Encoding.PEM)
            identities.append((key_to_pem(key).decode(), pem.decode()))
    store.close()
    return authority, identities


def cpu_s(pid: int) -> float:
    """Give the processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- what is measured --


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What came out."""

    num_devices: int
    connect_s: float
    """Until all had connected, one handshake after the other."""
    idle_s: float
    num_lost: int
    """Devices that were not connected all the time."""
    beats_per_s: float
    base_bytes: int
    """The coordinator before the first device."""
    bytes_per_device: float
    cpu_share: float
    """Of one core, while idle."""
    cohort: int
    start_s: tuple[float, ...]
    """Of each round: from the operator's order until all have sent their keys."""


async def wait_for_all(operator: Operator, crowd: Crowd, num_devices: int) -> float:
    """Wait until all are connected; gives the seconds."""
    start = time.perf_counter()
    while (await operator.status()).num_connected < num_devices:
        if crowd.count()["ended"] or time.perf_counter() - start > CONNECT_TIMEOUT_S:
            raise TimeoutError(f"not all devices connect: {crowd.count()}")
        await asyncio.sleep(0.5)
    return time.perf_counter() - start


async def start_round(operator: Operator, scale: Scale) -> float:
    """Start a round, wait for everybody's keys, end it; gives the seconds until then."""
    plan = pb.CampaignPlan(
        model_name="idle",
        num_rounds=1,
        cohort=scale.cohort,
        min_cohort=scale.cohort // 2,
        value_bits=18,
        clip=0.5,
        max_weight=1,
        server_learning_rate=1.0,
        invite_timeout_s=ROUND_TIMEOUT_S,
        stage_timeout_s=ROUND_TIMEOUT_S,
        training_timeout_s=ROUND_TIMEOUT_S,
        expected_dropout=0.1,
        colluder_share=0.05,
        protection=pb.PROTECTION_SECURE,
    )
    model = to_bytes({"weights": np.zeros(1000, np.float32)})
    start = time.perf_counter()
    name = await operator.start_campaign(plan, model)
    async with asyncio.timeout(ROUND_TIMEOUT_S):
        async for state in operator.watch(name):
            if state.rounds and state.rounds[0].stage != pb.ROUND_STAGE_KEYS:
                break
    took_s = time.perf_counter() - start
    assert len(state.rounds[0].cohort) == scale.cohort, state
    await operator.cancel(name)
    return took_s


async def measure(state: Path, pid: int, crowd: Crowd, scale: Scale, begin: Any) -> Figures:
    """Connect all, wait, start rounds."""
    async with connect(state) as operator:
        base_bytes = status_bytes(pid, "VmRSS")
        begin(operator.address)
        connect_s = await wait_for_all(operator, crowd, scale.num_devices)
        before, cpu_before, start = crowd.count(), cpu_s(pid), time.perf_counter()
        await asyncio.sleep(scale.idle_s)
        idle_s = time.perf_counter() - start
        after, cpu_after = crowd.count(), cpu_s(pid)
        full_bytes = status_bytes(pid, "VmRSS")
        start_s = [await start_round(operator, scale) for _ in range(scale.num_rounds)]
        still = (await operator.status()).num_connected
    return Figures(
        num_devices=scale.num_devices,
        connect_s=connect_s,
        idle_s=idle_s,
        num_lost=max(after["ended"], scale.num_devices - still),
        beats_per_s=(after["beats"] - before["beats"]) / idle_s,
        base_bytes=base_bytes,
        bytes_per_device=(full_bytes - base_bytes) / scale.num_devices,
        cpu_share=(cpu_after - cpu_before) / idle_s,
        cohort=scale.cohort,
        start_s=tuple(start_s),
    )


def allow_files(num: int) -> None:
    """Raise the limit of open files for this process and those that it starts.

    Raises:
        SystemExit: the machine does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < num:
        sys.exit(f"{num} open files are needed, the machine allows {hard}: raise `ulimit -Hn`")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, num), hard))


def print_figures(figures: Figures) -> None:
    """Print one row a figure."""
    starts = sorted(figures.start_s)
    rows = [
        ["connected one after the other", "", f"{figures.connect_s:.0f} s"],
        ["idle for", "", f"{figures.idle_s:.0f} s"],
        ["lost meanwhile", "", f"{figures.num_lost}"],
        ["heartbeats", "", f"{figures.beats_per_s:.0f}/s"],
        ["coordinator before", "", f"{figures.base_bytes / 1e6:.0f} MB"],
        ["per device", "", f"{figures.bytes_per_device / 1e3:.1f} KB"],
        ["processor, idle", "", f"{100 * figures.cpu_share:.1f} % of a core"],
        [f"round with {figures.cohort} starts", "median", f"{starts[len(starts) // 2]:.2f} s"],
        ["", "slowest", f"{starts[-1]:.2f} s"],
    ]
    print_table(f"{figures.num_devices:,} connected devices", ("", "", "coordinator"), rows)


def targets(figures: Figures) -> Iterator[Target]:
    """Compare with what is to be reached."""
    name = f"idle_fleet_{figures.num_devices}"
    yield Target(name=f"{name}_cpu_percent", value=100 * figures.cpu_share, goal=f"<={CPU_GOAL}")
    yield Target(
        name=f"{name}_kb_per_device", value=figures.bytes_per_device / 1e3, goal=f"<={KB_GOAL}"
    )
    yield Target(name=f"{name}_lost", value=figures.num_lost, goal="<=0")
    starts: Sequence[float] = sorted(figures.start_s)
    yield Target(
        name=f"{name}_round_of_{figures.cohort}_start_s",
        value=starts[len(starts) // 2],
        goal=f"<={START_GOAL_S}",
    )


def main() -> None:
    """Measure, print, write."""
    options = arguments(__doc__ or "").parse_args()
    scale = QUICK if options.quick else FULL
    allow_files(scale.num_devices + SPARE_FILES)
    under = conditions(["grpcio", "cryptography"])
    print_conditions(under)
    with ending_cleanly(), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="idle-fleet-")))
        state = folder / "coordinator"
        authority, identities = enrol_all(state, scale.num_devices)
        coordinator = start_coordinator(stack, state, folder)
        crowd = Crowd(stack, scale, folder)

        def begin(address: str) -> None:
            crowd.begin(authority, address, identities)

        figures = asyncio.run(measure(state, coordinator.pid, crowd, scale, begin))
    under["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
    print(f"load average at the end: {' '.join(map(str, under['load_average_at_end']))}")
    print_figures(figures)
    report = {
        "benchmark": "idle_fleet",
        "quick": options.quick,
        "conditions": under,
        "figures": asdict(figures),
    }
    conclude(report, list(targets(figures)), options.json)


if __name__ == "__main__":
    main()
