"""Where data is, as a URI: what kind of source that is, and which part of it nobody may see.

    readings.csv, readings.csv.gz, readings.tsv    a table of text
    readings.parquet, readings/                    Parquet, one file or a folder of them
    readings.npz                                   NumPy arrays
    s3://bucket/readings.parquet                   any of these, on any file system that fsspec has
    sqlite:///plant.db#readings                    a table, or a SELECT, of any SQLAlchemy database
    plant.view.toml                                several of these, joined; see `data/views.py`

`${NAME}` in a URI is taken from the environment when it is opened, so that passwords need not stand
in a file. A password that does stand in one is cut out of all that Minga logs or keeps.
"""

import os
import re
from enum import StrEnum
from typing import Annotated
from urllib.parse import unquote

from pydantic import AfterValidator

from minga.training.errors import DataError

HIDDEN = "***"

# A password may hold characters that should be escaped: up to the last @ before ? or #, else any @.
_USER = re.compile(r"(?<=//)(?P<user>[^/?#@:]*):(?P<secret>[^?#\s]*|[^@\s]*)@")
_QUERY = re.compile(
    r"(?i)(?P<name>[?&;][^=&;#]*"
    r"(?:password|passwd|pwd|secret|token|signature|sig|credential|key)[^=&;#]*=)"
    r"(?P<secret>[^&;#]*)"
)
_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
_DATABASES = frozenset(
    {"sqlite", "postgresql", "postgres", "mysql", "mariadb", "oracle", "mssql", "duckdb"}
)


class Kind(StrEnum):
    """What a source is."""

    CSV = "csv"
    PARQUET = "parquet"
    NPZ = "npz"
    SQL = "sql"
    VIEW = "view"


def kind_of(uri: str) -> Kind:
    """Tell what kind of source a URI names.

    Raises:
        DataError: none that is known.
    """
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme.partition("+")[0] in _DATABASES:
        return Kind.SQL
    name = uri.rstrip("/").lower()
    if name.endswith(".view.toml"):
        return Kind.VIEW
    if name.endswith((".csv", ".csv.gz", ".tsv", ".tsv.gz")):
        return Kind.CSV
    if name.endswith(".npz"):
        return Kind.NPZ
    if name.endswith((".parquet", ".pq")) or "." not in name.rpartition("/")[2]:
        return Kind.PARQUET
    raise DataError(
        f"{redacted(uri)} is no source that Minga knows; give .csv, .csv.gz, .tsv, .parquet, "
        ".npz, .view.toml, a folder of Parquet files, or a database's URL with #table"
    )


def redacted(uri: str) -> str:
    """Cut passwords, keys and signatures out of a URI; placeholders stay."""

    def hide(found: re.Match[str]) -> str:
        secret = found["secret"]
        if not secret or _PLACEHOLDER.fullmatch(secret):
            return found[0]
        return found[0].replace(secret, HIDDEN)

    return _QUERY.sub(hide, _USER.sub(hide, uri))


def expanded(uri: str) -> str:
    """Put the environment's values in place of `${NAME}`.

    Raises:
        DataError: the environment has no such name.
    """

    def value(found: re.Match[str]) -> str:
        if found[1] not in os.environ:
            raise DataError(
                f"{redacted(uri)} needs {found[1]}, which the environment does not have; "
                f"set it with: export {found[1]}=..."
            )
        return os.environ[found[1]]

    return _PLACEHOLDER.sub(value, uri)


def scrubbed(text: str, uri: str) -> str:
    """Cut a URI's secrets, also those from the environment, out of what a driver says about it."""
    filled = _PLACEHOLDER.sub(lambda found: os.environ.get(found[1], ""), uri)
    for pattern in (_USER, _QUERY):
        for found in pattern.finditer(filled):
            for secret in {found["secret"], unquote(found["secret"])} - {""}:
                text = text.replace(secret, HIDDEN)
    return text


PublicUri = Annotated[str, AfterValidator(redacted)]
"""A URI that is logged or kept: without its secrets."""
