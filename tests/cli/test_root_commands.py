"""`minga root`, `minga coordinator request` and `install`: the ceremony as an operator types it."""

import subprocess
import sys
from pathlib import Path

import pytest

from minga.cluster.processes import LocalFleet
from minga.federation.certificates import load_certificate
from minga.federation.identity import load_identity

MINGA = [sys.executable, "-m", "minga.cli"]


def run(*words: str | Path, code: int = 0) -> str:
    """Run a command to its end, without a terminal; gives what it said."""
    done = subprocess.run(
        [*MINGA, *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
def test_the_ceremony_from_the_first_key_to_a_device(tmp_path: Path) -> None:
    """Each step with the next one's file; a passphrase from a file; a device under the root."""
    vault, state = tmp_path / "vault", tmp_path / "fleet" / "coordinator"
    passphrase = tmp_path / "passphrase"
    passphrase.write_text("seven press shops in a row\n")
    asked = ["--folder", vault, "--passphrase-file", passphrase]
    request, signed = tmp_path / "request.pem", tmp_path / "intermediate.pem"

    made = run("root", "create", *asked)
    assert "passphrase" not in made
    fingerprint = made.split("fingerprint  ")[1].splitlines()[0]
    shown = run("coordinator", "request", request, "--root", vault / "root.pem", "--state", state)
    assert fingerprint in shown
    assert "waits for its intermediate" in run("coordinator", "run", "--state", state, code=31)
    assert "intermediate 1" in run("root", "sign", request, signed, *asked, "--days", "30")
    assert "intermediate 1" in run("coordinator", "install", signed, "--state", state)

    with LocalFleet(tmp_path / "fleet") as fleet:
        assert fleet.state == state
        fleet.start_coordinator(reconnect_grace_s=1.0)
        token = run("coordinator", "token", "--state", state).strip()
        folder = tmp_path / "press-1"
        run("device", "enroll", token, "--folder", folder, "--name", "press-1")
    identity = load_identity(folder)
    assert identity.authority == load_certificate(vault / "root.pem")
    assert identity.intermediate == load_certificate(signed)
    assert "each following the one before" in run("audit", "verify", "--state", state)

    # The second time the coordinator knows its root.
    run("coordinator", "request", request, "--state", state)
    assert "intermediate 2" in run("root", "sign", request, signed, *asked)
    assert "intermediate 2" in run("coordinator", "install", signed, "--state", state)


def test_what_the_ceremony_refuses(tmp_path: Path) -> None:
    """Each with one line, a remedy, and a code that says which kind."""
    vault, request = tmp_path / "vault", tmp_path / "request.pem"
    folder = ["--folder", vault]
    assert "--passphrase-file" in run("root", "create", *folder, code=31)
    run("root", "create", *folder, "--no-passphrase")
    assert "holds a root already" in run("root", "create", *folder, "--no-passphrase", code=31)
    sign = ["root", "sign", request, tmp_path / "out.pem", *folder]
    assert "cannot read the signing request" in run(*sign, code=30)
    state = ["--state", tmp_path / "coordinator"]
    assert "--root" in run("coordinator", "request", request, *state, code=31)
    root = ["--root", vault / "root.pem"]
    run("coordinator", "request", request, *root, *state)
    assert "1 to 3650 days" in run(*sign, "--days", "0", code=35)
    run(*sign)
    other = ["--state", tmp_path / "other"]
    run("coordinator", "request", tmp_path / "other.pem", *root, *other)
    refused = run("coordinator", "install", tmp_path / "out.pem", *other, code=31)
    assert "newest request" in refused
