"""Data on its way in: read, checked, measured, named.

sources          tables, arrays and images from files, object stores and databases
views            several sources as one table
tables           a table as numbers, and its splits
larger           splits of a table that does not fit into memory
reading          what a Task's `data` gives, and the digest that names it
checks           splits against a schema and a reference profile
tfdv             a schema for TensorFlow Data Validation
"""

from minga.training.data.checks import DataReport, Violation, check
from minga.training.data.larger import stored_splits
from minga.training.data.reading import SPLIT_NAMES, digest_of, profile_of, read_splits
from minga.training.data.sources import (
    Images,
    read_arrays,
    read_images,
    read_table,
    stream_table,
)
from minga.training.data.tables import in_order, matrix, numbers, shuffled

__all__ = [
    "SPLIT_NAMES",
    "DataReport",
    "Images",
    "Violation",
    "check",
    "digest_of",
    "in_order",
    "matrix",
    "numbers",
    "profile_of",
    "read_arrays",
    "read_images",
    "read_splits",
    "read_table",
    "shuffled",
    "stored_splits",
    "stream_table",
]
