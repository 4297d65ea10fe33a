"""What a device keeps for itself from round to round."""

from pathlib import Path

import numpy as np
import pytest

from minga.federation.device.keepsakes import Keepsakes
from minga.federation.errors import PeerError
from minga.federation.parameters import Parameters

ROUND = "ab" * 16
CAMPAIGN = "0123456789ab"


def tensors(value: float) -> Parameters:
    return {"head.w": np.full((2, 3), value, np.float32), "head/b": np.float32([value])}


def stage(kept: Keepsakes, value: float, **changes: object) -> None:
    names = {"model_name": "toy", "campaign_id": CAMPAIGN}
    own = {"personal": tensors(value), "control": tensors(-value)}
    kept.stage(**{"round_id": ROUND, **names, **own, **changes})  # type: ignore[arg-type]


def same(one: Parameters, other: Parameters) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def test_only_what_counted_is_kept(tmp_path: Path) -> None:
    """A pending change takes effect when its round counted it, and is dropped when it did not."""
    kept = Keepsakes(tmp_path)
    assert not kept.pending
    stage(kept, 1.0)
    assert kept.pending == Keepsakes(tmp_path).pending == ROUND  # it outlives the process
    assert not kept.personal("toy")
    kept.settle(ROUND, counted=True)
    assert not kept.pending
    stage(kept, 2.0)
    kept.settle("cd" * 16, counted=True)  # another round says nothing of this one
    kept.settle(ROUND, counted=False)
    assert not kept.pending
    assert same(kept.personal("toy"), tensors(1.0))
    assert same(kept.control(CAMPAIGN), tensors(-1.0))
    assert not kept.personal("other")


def test_killed_while_it_settles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settling that was cut off in the middle is done again, to the same end."""
    kept = Keepsakes(tmp_path)
    stage(kept, 1.0)
    with monkeypatch.context() as broken:
        broken.setattr(kept, "_drop_pending", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kept.settle(ROUND, counted=True)
    assert kept.pending == ROUND
    kept.settle(ROUND, counted=True)
    assert not kept.pending
    assert same(kept.personal("toy"), tensors(1.0))


@pytest.mark.parametrize("name", ["../evil", "", "a/b", "UPPER", "x" * 64])
def test_names_from_outside_are_no_paths(tmp_path: Path, name: str) -> None:
    """A coordinator cannot make a device read or write elsewhere."""
    kept = Keepsakes(tmp_path / "inside")
    with pytest.raises(PeerError):
        kept.personal(name)
    with pytest.raises(PeerError):
        kept.control(name + "/")
    with pytest.raises(PeerError):
        stage(kept, 1.0, model_name=name)
    with pytest.raises(PeerError):
        stage(kept, 1.0, round_id=name + "/")
    kept.settle(name, counted=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["inside"]


def test_damaged_file_is_started_anew(tmp_path: Path) -> None:
    """A file that is no more what was written costs what it held, not the device its rounds."""
    kept = Keepsakes(tmp_path)
    stage(kept, 1.0)
    kept.settle(ROUND, counted=True)
    (tmp_path / "personal-toy.safetensors").write_bytes(b"garbage")
    assert not kept.personal("toy")
    assert same(kept.control(CAMPAIGN), tensors(-1.0))
