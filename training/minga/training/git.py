"""What Git says about a folder."""

import subprocess
from pathlib import Path


class GitError(Exception):
    """Git refused, or there is none here; the message is its last line."""


def git(folder: Path, *words: str, timeout_s: float = 10.0) -> str:
    """Ask the user's Git about the repository that a folder is in.

    Args:
        folder: where to ask.
        words: of the command line, behind `git`.
        timeout_s: how long it may take.

    Raises:
        GitError: there is no Git, no repository, or nothing by that name.
    """
    try:
        done = subprocess.run(  # noqa: S603 - words of ours and recorded commits, no shell
            ("git", "-C", str(folder), *words),  # noqa: S607 - whichever git the user has
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise GitError(f"git cannot be asked: {error}") from error
    if done.returncode != 0:
        raise GitError((done.stderr.strip().splitlines() or ["git failed"])[-1])
    return done.stdout.strip()
