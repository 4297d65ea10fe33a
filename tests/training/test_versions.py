"""Versions of data: its content, DVC's records of it, and what was changed since.

The MD5 sums and the records are those that DVC 3 itself wrote of these files.
"""

import subprocess

import pytest

from minga.training.data.versions import dvc_version, require_version, sha256_of, versions_of
from minga.training.errors import DataError, TamperedError

FILE = "outs:\n- md5: e5ebd4c02cefbe7955977c67ada242b7\n  size: 8\n  hash: md5\n  path: a.csv\n"
FOLDER = (
    "outs:\n- md5: 19cea1c3350a0b35a0a6c1bd4b999bce.dir\n  size: 6\n  nfiles: 3\n  hash: md5\n"
    "  path: parts\n"
)
LOCK = """schema: '2.0'
stages:
  make:
    cmd: cp a.csv out.csv
    deps:
    - path: a.csv
      hash: md5
      md5: e5ebd4c02cefbe7955977c67ada242b7
      size: 8
    outs:
    - path: out.csv
      hash: md5
      md5: e5ebd4c02cefbe7955977c67ada242b7
      size: 8
"""


@pytest.fixture
def tracked(tmp_path):
    """A file, a folder and a stage's product, tracked by DVC in a Git repository."""
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    (tmp_path / "out.csv").write_text("a,b\n1,2\n")
    (tmp_path / "parts" / "sub").mkdir(parents=True)
    (tmp_path / "parts" / "b.csv").write_text("x\n")
    (tmp_path / "parts" / "sub" / "a.csv").write_text("y\n")
    (tmp_path / "parts" / "ä.csv").write_text("z\n")
    (tmp_path / "a.csv.dvc").write_text(FILE)
    (tmp_path / "parts.dvc").write_text(FOLDER)
    (tmp_path / "dvc.lock").write_text(LOCK)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "a.csv.dvc", "parts.dvc", "dvc.lock")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=a@b.c", "commit", "-qm", "data")
    return tmp_path


def git(folder, *words):
    """Run Git and give what it says."""
    return subprocess.check_output(("git", "-C", str(folder), *words), text=True).strip()


@pytest.mark.parametrize(
    ("name", "record", "md5"),
    [
        ("a.csv", "a.csv.dvc", "e5ebd4c02cefbe7955977c67ada242b7"),
        ("parts", "parts.dvc", "19cea1c3350a0b35a0a6c1bd4b999bce.dir"),
        ("parts/sub/a.csv", "parts.dvc", "19cea1c3350a0b35a0a6c1bd4b999bce.dir"),
        ("out.csv", "dvc.lock", "e5ebd4c02cefbe7955977c67ada242b7"),
    ],
)
def test_records_are_found_with_their_commit(tracked, name, record, md5):
    """A file, a folder, a file in it, and a stage's product are known as DVC knows them."""
    version = dvc_version(tracked / name)
    assert (version.file, version.md5) == (record, md5)
    assert version.commit == git(tracked, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["a.csv", "parts/sub/a.csv", "out.csv"])
def test_changed_files_are_refused(tracked, name):
    """One changed byte of what DVC tracks is refused, with what to do."""
    (tracked / name).write_text("a,b\n1,3\n")
    with pytest.raises(TamperedError, match=r"has MD5 .* records .*dvc checkout"):
        versions_of(str(tracked / name))


def test_added_and_removed_files_of_a_folder_are_refused(tracked):
    """A folder is refused for a file too many or too few."""
    (tracked / "parts" / "new.csv").write_text("n\n")
    with pytest.raises(TamperedError):
        dvc_version(tracked / "parts")
    (tracked / "parts" / "new.csv").unlink()
    assert dvc_version(tracked / "parts") is not None
    (tracked / "parts" / "b.csv").unlink()
    with pytest.raises(TamperedError):
        dvc_version(tracked / "parts")


def test_record_that_is_not_committed_has_no_commit(tracked):
    """A record that differs from what Git has names no commit."""
    (tracked / "a.csv").write_text("a,b\n1,2")
    (tracked / "a.csv.dvc").write_text(FILE.replace("e5ebd4c0", "ffffffff"))
    with pytest.raises(TamperedError):
        dvc_version(tracked / "a.csv")
    (tracked / "a.csv").write_text("a,b\n1,2\n")
    (tracked / "a.csv.dvc").write_text(FILE + "meta: {owner: plant}\n")
    assert dvc_version(tracked / "a.csv").commit == ""


def test_broken_record_is_explained(tracked):
    """A record that is no YAML, or another one, is named."""
    (tracked / "a.csv.dvc").write_text("outs: [")
    with pytest.raises(DataError, match=r"a.csv.dvc is no file of DVC"):
        dvc_version(tracked / "a.csv")


def test_files_without_records_have_their_digest(tmp_path):
    """Without DVC a file has its SHA-256, a folder that of its list, a database URL none."""
    (tmp_path / "a.csv").write_text("1\n")
    (version,) = versions_of(str(tmp_path / "a.csv"))
    assert version.sha256 == "4355a46b19d348dc2f57c046f8ef63d4538ebb936000f3c9ee954a27460dd865"
    assert version.dvc is None
    before = sha256_of(tmp_path)
    (tmp_path / "a.csv").rename(tmp_path / "b.csv")
    assert sha256_of(tmp_path) != before
    (remote,) = versions_of("postgresql://minga:secret@db/plant#t")
    assert (remote.sha256, remote.source) == ("", "postgresql://minga:***@db/plant#t")


def test_sources_of_a_view_have_versions_of_their_own(tracked):
    """A view is named by its rules and by each of its sources."""
    (tracked / "v.view.toml").write_text('[[source]]\nname = "a"\nuri = "a.csv"\n')
    view, source = versions_of(str(tracked / "v.view.toml"))
    assert view.sha256
    assert source.dvc.file == "a.csv.dvc"


def test_digest_in_the_settings_is_held(tmp_path):
    """`[data] sha256` refuses any other content."""
    file = tmp_path / "a.csv"
    file.write_text("1\n")
    digest = sha256_of(file)
    require_version(str(file), digest)
    file.write_text("2\n")
    with pytest.raises(TamperedError, match=r"\[data\] sha256 says"):
        require_version(str(file), digest)
    with pytest.raises(DataError, match="cannot be held"):
        require_version("s3://bucket/a.csv", digest)
