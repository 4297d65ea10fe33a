"""The code of then: a project's folder as it was at a commit, beside the one of today."""

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from minga.cluster.errors import ReproductionError
from minga.training.git import GitError, git
from minga.training.lineage import Code, code_of
from minga.training.task import TaskReference

CHECKOUT_TIMEOUT_S = 600.0

Differs = tuple[str, str, str]
"""What is not as it was, how it was, and how it is."""


@contextmanager
def checked_out(reference: TaskReference, code: Code) -> Iterator[tuple[Path, tuple[Differs, ...]]]:
    """Give a project folder with recorded code, and say where that is impossible.

    The folder of today is given if its code is the recorded one; else the commit is checked out
    into a folder of its own, which is removed afterwards.

    Args:
        reference: of the Task today.
        code: as it was recorded.

    Yields:
        the project folder, and what about its code is not as it was.

    Raises:
        ReproductionError: the commit is not in the repository, or the Task's file not in it.
    """
    today = code_of(reference) if reference.file.is_file() else Code(task_sha256="")
    is_same_file = today.task_sha256 == code.task_sha256
    is_same_commit = code.commit == today.commit and not today.dirty
    if not code.commit or (is_same_file and (is_same_commit or code.dirty)):
        yield reference.root, tuple(_differs(code, today))
        return
    with tempfile.TemporaryDirectory(prefix="minga-code-") as scratch:
        folder = Path(scratch) / "code"
        prefix = _git(reference.root, "rev-parse", "--show-prefix")
        _git(reference.root, "worktree", "add", "--detach", str(folder), code.commit)
        try:
            then = replace(reference, root=folder / prefix)
            if not then.file.is_file():
                raise ReproductionError(f"commit {code.commit[:12]} has no {reference.name}")
            found = Code(
                commit=code.commit,
                task_sha256=hashlib.sha256(then.file.read_bytes()).hexdigest(),
            )
            yield then.root, tuple(_differs(code, found))
        finally:
            _git(reference.root, "worktree", "remove", "--force", str(folder))


def _differs(was: Code, used: Code) -> Iterator[Differs]:
    if was.dirty:
        yield "Git tree", f"{was.commit[:12]} with uncommitted changes", _state(used)
    elif was.commit != used.commit or used.dirty:
        yield "Git tree", _state(was), _state(used)
    if was.task_sha256 != used.task_sha256:
        yield "Task's file", f"sha256 {was.task_sha256[:12]}", f"sha256 {used.task_sha256[:12]}"


def _state(code: Code) -> str:
    if not code.commit:
        return "no Git repository"
    return code.commit[:12] + (" with uncommitted changes" if code.dirty else "")


def _git(root: Path, *words: str) -> str:
    try:
        return git(root, *words, timeout_s=CHECKOUT_TIMEOUT_S)
    except GitError as error:
        raise ReproductionError(
            f"the code of then cannot be checked out: {error}; "
            "fetch the commit, or run in the repository that has it"
        ) from error
