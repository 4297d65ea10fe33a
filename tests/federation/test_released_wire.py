"""The wire of the last release is kept: what `make check` refuses and what it lets pass."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROTOS = Path(__file__).parents[2] / "protos"
FILE = "minga/federation/v1/federation.proto"
BUF = Path(sys.executable).with_name("buf")

BROKEN = {
    "a field is removed": ("  string agent_version = 1;\n", ""),
    "a field has another number": ("bool trains = 2;", "bool trains = 9;"),
    "a field has another type": ("uint32 num_neighbours = 4;", "string num_neighbours = 4;"),
    "a field becomes repeated": ("bytes mask_key = 3;", "repeated bytes mask_key = 3;"),
    "a field leaves its oneof": (
        "  oneof part {\n    UploadHeader header = 1;\n",
        "  UploadHeader header = 1;\n  oneof part {\n",
    ),
    "a method is removed": ("  rpc Renew(RenewRequest) returns (RenewResponse);\n", ""),
    "a method answers otherwise": (
        "rpc Enroll(EnrollRequest) returns (EnrollResponse)",
        "rpc Enroll(EnrollRequest) returns (RenewResponse)",
    ),
    "a value is removed": ("  MODEL_STATE_FAILED = 2;\n", ""),
}
KEPT = {
    "nothing": ("", ""),
    "a field is added": ("bool trains = 2;", "bool trains = 2;\n  string site = 99;"),
    "a message is added": (
        "message GetStatusRequest {}",
        "message GetStatusRequest {}\nmessage Nap {}",
    ),
    "a method is added": (
        "  rpc Renew(RenewRequest) returns (RenewResponse);",
        "  rpc Renew(RenewRequest) returns (RenewResponse);\n"
        "  rpc Revoke(RenewRequest) returns (RenewResponse);",
    ),
    "a value is added": (
        "  MODEL_STATE_FAILED = 2;",
        "  MODEL_STATE_FAILED = 2;\n  MODEL_STATE_LATE = 3;",
    ),
    "a removed field stays reserved": (
        "  string agent_version = 1;\n",
        '  reserved 1;\n  reserved "agent_version";\n',
    ),
}


def compare(folder: Path, change: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Change the protos and hold them against the released wire, as `make check` does."""
    protos = Path(shutil.copytree(PROTOS, folder / "protos"))
    text = (protos / FILE).read_text()
    assert change[0] in text
    (protos / FILE).write_text(text.replace(*change, 1))
    return subprocess.run(
        [BUF, "breaking", protos, "--against", PROTOS / "released.binpb"],
        check=False,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN.keys())
def test_what_breaks_released_devices_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    """A wire that devices of the last release would misread does not pass, and buf says where."""
    done = compare(tmp_path, change)
    assert done.returncode != 0
    assert FILE in done.stdout


@pytest.mark.parametrize("change", KEPT.values(), ids=KEPT.keys())
def test_what_is_added_passes(tmp_path: Path, change: tuple[str, str]) -> None:
    """The wire may grow."""
    done = compare(tmp_path, change)
    assert done.returncode == 0, done.stdout + done.stderr


def test_make_check_compares() -> None:
    """The comparison is among what `make check` runs."""
    steps = subprocess.check_output(["make", "--dry-run", "check"], cwd=PROTOS.parent, text=True)
    assert "buf breaking protos --against protos/released.binpb" in steps
