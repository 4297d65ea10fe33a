"""URIs: which are files here, and what of one nobody may see when it is logged or kept.

`${NAME}` in a URI stands for what the environment has under that name, which is no secret yet.
"""

import os
import re
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

HIDDEN: Final = "***"

PLACEHOLDER: Final = re.compile(r"\$\{(\w+)\}")
# A password may hold characters that should be escaped: up to the last @ before ? or #, else any @.
_USER = re.compile(r"(?<=//)(?P<user>[^/?#@:]*):(?P<secret>[^?#\s]*|[^@\s]*)@")
_QUERY = re.compile(
    r"(?i)(?P<name>[?&;][^=&;#]*"
    r"(?:password|passwd|pwd|secret|token|signature|sig|credential|key)[^=&;#]*=)"
    r"(?P<secret>[^&;#]*)"
)


def local_path(uri: str) -> Path | None:
    """Give the path behind a file URI or a bare path; None if it is somewhere else."""
    parsed = urlsplit(uri)
    if parsed.scheme == "file":
        return Path(unquote(parsed.path))
    return None if parsed.scheme else Path(uri)


def redacted(uri: str) -> str:
    """Cut passwords, keys and signatures out of a URI; placeholders stay."""

    def hide(found: re.Match[str]) -> str:
        secret = found["secret"]
        if not secret or PLACEHOLDER.fullmatch(secret):
            return found[0]
        return found[0].replace(secret, HIDDEN)

    return _QUERY.sub(hide, _USER.sub(hide, uri))


def scrubbed(text: str, uri: str) -> str:
    """Cut a URI's secrets, also those from the environment, out of what a driver says about it."""
    filled = PLACEHOLDER.sub(lambda found: os.environ.get(found[1], ""), uri)
    for pattern in (_USER, _QUERY):
        for found in pattern.finditer(filled):
            for secret in {found["secret"], unquote(found["secret"])} - {""}:
                text = text.replace(secret, HIDDEN)
    return text
