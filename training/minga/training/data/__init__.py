"""Data on its way in: read, checked, measured, named.

checks      a split against a schema and a reference profile
reading     what a Task's `data` gives, and the digest that names it
"""

from minga.training.data.checks import DataReport, Violation, check
from minga.training.data.reading import SPLIT_NAMES, digest_of, profile_of, read_splits

__all__ = [
    "SPLIT_NAMES",
    "DataReport",
    "Violation",
    "check",
    "digest_of",
    "profile_of",
    "read_splits",
]
