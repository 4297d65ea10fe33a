"""Servers ask for as many open files as their user may have, and fill them in part only."""

import subprocess
import sys

import pytest

from minga.inference import open_files

SCRIPT = """
import resource
from minga.cli.services import run_service

async def service():
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))

run_service(service())
"""


def test_a_service_raises_its_limit():
    """Started with room for 200 files, as far as its user may have 900, it has 900."""
    limited = ["sh", "-c", 'ulimit -Sn 200 && ulimit -Hn 900 && exec "$@"', "sh"]
    words = [*limited, sys.executable, "-c", SCRIPT]
    done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["900", "900"]


@pytest.mark.parametrize(("soft", "most"), [(1024, 768), (20_000, 8192), (-1, 8192), (1, 1)])
def test_connections_leave_files_for_all_else(soft, most, monkeypatch):
    """Three quarters of the files, but no more than a process can care for; -1 is no limit."""
    monkeypatch.setattr(open_files.resource, "getrlimit", lambda _: (soft, soft))
    assert open_files.max_connections() == most
