"""Which version of its data a run was made of, and whether the files still are that version.

A source that is a file or a folder of files is named by the SHA-256 of its content. Files that DVC
tracks are known by DVC's own MD5 too: from `FILE.dvc` beside the file or a folder above it, or from
the `outs` of a stage in `dvc.lock`. Where the content is another than the one recorded there, the
data is refused. The formats are DVC's (dvc.org/doc/user-guide/project-structure); DVC itself is not
needed.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from minga.inference.uris import redacted
from minga.training.document import Document
from minga.training.errors import DataError, TamperedError
from minga.training.git import GitError, git
from minga.training.uris import Kind, PublicUri, kind_of

CHUNK_BYTES = 1 << 20


class DvcVersion(Document):
    """What DVC recorded of a file or folder."""

    file: str
    """The `.dvc` file, or `dvc.lock`, that records it."""
    md5: str
    """As DVC writes it; of a folder it ends in `.dir`."""
    commit: str = ""
    """The Git commit that the record is of, if it is committed as it stands."""


class DataVersion(Document):
    """A source's version: its content, and what DVC calls it."""

    source: PublicUri
    sha256: str = ""
    """Of the file, or of the list of a folder's files; empty where only a driver can read it."""
    dvc: DvcVersion | None = None


def versions_of(source: str) -> tuple[DataVersion, ...]:
    """Name the version of a source, or of each source of a view and of the view itself.

    Raises:
        TamperedError: a file is not what DVC recorded.
        DataError: a DVC file cannot be read.
    """
    path = path_of(source)
    if path is None or not path.exists():
        return (DataVersion(source=source),)
    found = [DataVersion(source=source, sha256=sha256_of(path), dvc=dvc_version(path))]
    if path.is_file() and kind_is_view(source):
        from minga.training.data.views import sources_of

        for inner in sources_of(path):
            found += versions_of(inner)
    return tuple(found)


def require_version(source: str, sha256: str) -> None:
    """Refuse a source whose content is not the one that the settings name.

    Raises:
        TamperedError: it is another.
        DataError: it is no file or folder on this machine.
    """
    path = path_of(source)
    if path is None or not path.exists():
        raise DataError(f"{redacted(source)} is no file here, so [data] sha256 cannot be held")
    seen = sha256_of(path)
    if seen != sha256.lower():
        raise TamperedError(
            f"{path} has SHA-256 {seen}, [data] sha256 says {sha256}; "
            "restore the file, or write the new digest down if the change is meant"
        )


def path_of(source: str) -> Path | None:
    """Give the file or folder that a source is, if it is one on this machine."""
    if source.startswith("file://"):
        return Path(unquote(urlsplit(source).path))
    if source.startswith("sqlite:///"):
        return Path(source.removeprefix("sqlite:///").partition("#")[0])
    return None if "://" in source else Path(source)


def kind_is_view(source: str) -> bool:
    """Tell whether a source is a view; a Task may have sources that nobody else knows."""
    try:
        return kind_of(source) is Kind.VIEW
    except DataError:
        return False


def sha256_of(path: Path) -> str:
    """Digest a file, or the names and digests of all files below a folder."""
    if path.is_file():
        return _digest(path, "sha256")
    lines = [f"{_digest(file, 'sha256')}  {name}" for name, file in _files(path)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def dvc_version(path: Path) -> DvcVersion | None:
    """Find what DVC recorded of a file or folder and hold its content against that.

    Raises:
        TamperedError: the content is another.
        DataError: the record cannot be read.
    """
    path = path.absolute()
    found = next(_records(path), None)
    if found is None:
        return None
    record, out = found
    tracked = (record.parent / str(out["path"])).resolve()
    recorded = str(out["md5"])
    seen = _md5_of_folder(tracked) if recorded.endswith(".dir") else _digest(tracked, "md5")
    if seen != recorded:
        raise TamperedError(
            f"{tracked} has MD5 {seen}, {record.name} records {recorded}; restore it with: "
            f"dvc checkout {record.name}, or record the change with: dvc commit"
        )
    return DvcVersion(file=record.name, md5=recorded, commit=_commit_of(record))


def _records(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Look for the record of a path: beside it, then beside each folder that it is in."""
    for tracked in (path, *path.parents[:-1]):
        for record in (tracked.with_name(tracked.name + ".dvc"), tracked.parent / "dvc.lock"):
            if record.is_file():
                for out in _outs(record):
                    located = (record.parent / str(out.get("path", ""))).resolve()
                    if "md5" in out and located == tracked.resolve():
                        yield record, out


def _outs(record: Path) -> list[dict[str, Any]]:
    import yaml

    try:
        content = yaml.safe_load(record.read_text(encoding="utf-8")) or {}
        if record.name == "dvc.lock":
            stages = content.get("stages") or {}
            return [out for stage in stages.values() for out in stage.get("outs") or []]
        # A folder of `wdir` moves what the outs' paths are relative to.
        base = str(content.get("wdir", "."))
        outs = content.get("outs") or []
        return [{**out, "path": str(Path(base) / str(out["path"]))} for out in outs]
    except (
        OSError,
        UnicodeDecodeError,
        yaml.YAMLError,
        AttributeError,
        TypeError,
        KeyError,
    ) as error:
        raise DataError(f"{record} is no file of DVC's: {error}") from error


def _md5_of_folder(folder: Path) -> str:
    """Digest a folder as DVC does: the JSON of its files' MD5 and paths, sorted by path."""
    listed = [{"md5": _digest(file, "md5"), "relpath": name} for name, file in _files(folder)]
    return hashlib.md5(json.dumps(listed).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _files(folder: Path) -> list[tuple[str, Path]]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted((file.relative_to(folder).as_posix(), file) for file in files)


def _digest(file: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _commit_of(record: Path) -> str:
    """Give the last commit that changed the record; empty if it is not committed as it stands."""
    try:
        if git(record.parent, "status", "--porcelain", "--", record.name):
            return ""
        return git(record.parent, "log", "-1", "--format=%H", "--", record.name)
    except GitError:
        return ""
