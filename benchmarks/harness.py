"""What benchmarks share: conditions, rivals in environments of their own, targets, tables, JSON.

This module runs in rivals' environments too: it needs the standard library, and rich for tables.
"""

import argparse
import ctypes
import gc
import importlib.metadata
import json
import operator
import os
import platform
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final, Self

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parent
CACHE: Final = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minga"
"""Where rivals' environments are kept, outside of what the repository's tools clean."""

STOP_TIMEOUT_S: Final = 5.0


# -- what is asked for --


def arguments(description: str) -> argparse.ArgumentParser:
    """Make the parser with the options that every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a rough answer within a minute")
    parser.add_argument("--ours-only", action="store_true", help="leave the rivals out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    return parser


# -- under which conditions --


def conditions(packages: Sequence[str]) -> dict[str, Any]:
    """Describe the machine, what else it does, and the versions of what is measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


class PeakMemory:
    """How much this process grows between two points, by the kernel's count of resident pages.

    Nothing is slowed down by it, which makes it fit for a run that is timed.
    """

    def __init__(self) -> None:
        self._base_bytes = 0

    def start(self) -> None:
        """Give freed memory back to the kernel, and count from here."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        forget_peak()
        self._base_bytes = _status_bytes("VmRSS")

    def stop(self) -> int:
        """Give the growth in bytes, at its highest."""
        return max(0, resident_peak() - self._base_bytes)


def forget_peak() -> None:
    """Count the peak of this process's resident pages from here on."""
    # "5" resets it: proc_pid_clear_refs(5).
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_peak() -> int:
    """Give the most bytes of pages that were resident at a time, libraries included."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"the kernel does not tell {name}")


# -- against whom --


class RivalError(Exception):
    """A rival cannot be installed, or failed."""


def pinned(package: str) -> str:
    """Give the requirement that constraints.txt has for a package, as `name==version`."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line.lower().startswith(f"{package.lower()}=="):
            return line.strip()
    raise RivalError(f"constraints.txt pins no {package}")


def rival_python(package: str, *beside: str) -> Path:
    """Make an environment that holds a rival and nothing of ours, unless it is there already.

    Args:
        package: the rival: a name, in the version that constraints.txt pins, or a requirement with
            a version, such as `pfl==0.6.0`.
        beside: what else it needs, as names; with them pip chooses what nobody names, since a rival
            may need other versions than we do.

    Returns:
        Its Python.

    Raises:
        RivalError: it cannot be installed.
    """
    requirement = package if "==" in package else pinned(package)
    folder = CACHE / f"{requirement}-python{sys.version_info.major}.{sys.version_info.minor}"
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if not stamp.exists():
        print(f"installing {requirement} into {folder}", file=sys.stderr)
        _call(sys.executable, "-m", "venv", "--clear", str(folder))
        constraints = () if beside else ("--constraint", str(ROOT / "constraints.txt"))
        pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        _call(*pip, *constraints, requirement, *map(pinned, beside))
        stamp.touch()
    return python


def _call(*command: str) -> None:
    """Run a command in silence; Ctrl-C ends it with this process."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RivalError(f"{' '.join(command[1:4])} failed: {said[-1] if said else 'no output'}")


class Rival:
    """A rival in a process of its own, asked for one thing at a time; a context manager.

    Args:
        python: See `rival_python`.
        module: What it runs, from this folder: a module that calls `answer_requests`.
    """

    def __init__(self, python: Path, module: str) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115 - see __exit__
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,  # Ctrl-C comes to this process alone, which then ends that one
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        """Give itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._requests, self._answers, self._errors):
            pipe.close()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request, wait for the answer.

        Raises:
            RivalError: it failed.
        """
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            raise RivalError(f"the rival failed: {said[-1] if said else 'no output'}")
        result: dict[str, Any] = json.loads(answer)
        return result


def answer_requests(answer: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
    """Be the process behind a `Rival`: answer each line of standard input with a line.

    When whoever asks is gone, this process ends at once, however busy it is.
    """
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            requests.put(line)
        os._exit(0)

    # What the rival prints must not mix with answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    threading.Thread(target=listen, daemon=True).start()
    while True:
        print(json.dumps(answer(json.loads(requests.get()))), file=answers, flush=True)


@contextmanager
def ending_cleanly() -> Iterator[None]:
    """Leave through all `finally` blocks on SIGTERM as well, and without a traceback on Ctrl-C."""

    def leave(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


# -- what came out --

_OPERATORS: Final = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure that is to be reached."""

    name: str
    value: float
    goal: str
    """`>=` or `<=`, then the bound."""

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return bool(_OPERATORS[self.goal[:2]](self.value, float(self.goal[2:])))

    def __str__(self) -> str:
        """Give the line that a benchmark ends with."""
        verdict = "met" if self.met else "missed"
        return f"TARGET {self.name} value={self.value:.4g} goal={self.goal} {verdict}"

    def as_json(self) -> dict[str, Any]:
        """Give what goes into the report."""
        return {"name": self.name, "value": self.value, "goal": self.goal, "met": self.met}


def print_conditions(under: Mapping[str, Any]) -> None:
    """Print conditions in three lines, and in a fourth how often what is run."""
    load = " ".join(str(value) for value in under["load_average"])
    print(f"{under['cpu']}, {under['cores']} cores, Linux {under['kernel']}, {under['time']}")
    print(f"load average at the start: {load}")
    versions = ", ".join(f"{name} {version}" for name, version in under["versions"].items())
    print(f"Python {under['python']}, {versions}")
    if "runs" in under:
        print(f"runs: {under['runs']}")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; an empty row draws a line."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        if row:
            table.add_row(*row)
        else:
            table.add_section()
    console = Console()
    # Where nobody looks at a terminal there is no width to keep to.
    (console if console.is_terminal else Console(width=160)).print(table)


def conclude(report: dict[str, Any], targets: Sequence[Target], file: Path | None) -> None:
    """Print the targets and write the report. A missed target is not a failure of the program."""
    for target in targets:
        print(target)
    if file is not None:
        report = {**report, "targets": [target.as_json() for target in targets]}
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
