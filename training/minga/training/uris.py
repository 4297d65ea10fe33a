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

from pydantic import AfterValidator

from minga.inference.uris import PLACEHOLDER, redacted
from minga.training.errors import DataError

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

    return PLACEHOLDER.sub(value, uri)


PublicUri = Annotated[str, AfterValidator(redacted)]
"""A URI that is logged or kept: without its secrets."""
