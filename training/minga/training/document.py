"""The base of what is stored as JSON beside a model."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from minga.training.errors import RegistryError


class Document(BaseModel):
    """A JSON file that a registered version carries; read back into the same typed value."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    def write(self, path: Path) -> None:
        """Write as indented JSON, the same bytes for the same value."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote.

        Raises:
            RegistryError: the file is missing or is not such a document.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise RegistryError(
                f"{path} is no {cls.__name__.lower()} that this version of Minga reads: {error}"
            ) from error
