"""Files that are wholly there or not there at all."""

import pytest

from minga.federation.durable import replacing


@pytest.mark.parametrize("durably", [False, True])
def test_file_is_replaced_when_all_went_well(tmp_path, durably):
    """What fails half way leaves the file as it was, and the next writer finds its way free."""
    file = tmp_path / "trial-1.json"
    for content, fails in (("one", False), ("half", True), ("two", False)):
        before = file.read_text() if file.exists() else None
        try:
            with replacing(file, durably=durably) as unfinished:
                unfinished.write_text(content)
                if fails:
                    raise OSError("the disk is full")
        except OSError:
            assert fails
        assert file.read_text() == (before if fails else content)
    assert list(tmp_path.iterdir()) == [file]
