"""The folder that a registered version carries.

model.onnx            preparation and model; `input` -> `output`
weights.safetensors   the network's parameters; reading them runs no code
schema.json           what valid data looks like
profile.json          the reference profile: inputs, targets, outputs
gates.json            the verdict, whatever it was
lineage.json          data, code, environment, parameters, parent
README.md             the model card
MLmodel, ...          so that MLflow's own tools load it too
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from minga.federation.errors import PeerError
from minga.federation.parameters import Parameters, from_bytes, to_bytes
from minga.training.card import card_of
from minga.training.errors import RegistryError
from minga.training.gates import GateReport
from minga.training.lineage import Lineage
from minga.training.profile import Profile
from minga.training.schema import Schema

MODEL = "model.onnx"
WEIGHTS = "weights.safetensors"
SCHEMA = "schema.json"
PROFILE = "profile.json"
GATES = "gates.json"
LINEAGE = "lineage.json"
CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """All that a version carries, in memory."""

    onnx: bytes
    parameters: Parameters
    schema: Schema
    profile: Profile
    gates: GateReport
    lineage: Lineage

    def write(self, folder: Path) -> None:
        """Write the folder, which must not exist."""
        from minga.training.tracking import save_mlflow_model

        save_mlflow_model(self.onnx, folder)
        (folder / WEIGHTS).write_bytes(to_bytes(self.parameters))
        self.schema.write(folder / SCHEMA)
        self.profile.write(folder / PROFILE)
        self.gates.write(folder / GATES)
        self.lineage.write(folder / LINEAGE)
        (folder / CARD).write_text(
            card_of(self.schema, self.profile, self.gates, self.lineage), encoding="utf-8"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """SHA-256 of a bundle's parts and of the whole, in hexadecimal."""

    onnx: str
    weights: str
    bundle: str

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Digest a bundle's folder; the whole covers every file's path and content."""
        parts = {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for name in (MODEL, WEIGHTS):
            if name not in parts:
                raise RegistryError(f"{folder} is no bundle: it has no {name}")
        lines = "\n".join(f"{digest}  {name}" for name, digest in sorted(parts.items()))
        return cls(
            onnx=parts[MODEL],
            weights=parts[WEIGHTS],
            bundle=hashlib.sha256(lines.encode()).hexdigest(),
        )


def read_parameters(folder: Path) -> Parameters:
    """Read a bundle's parameters.

    Raises:
        RegistryError: the file is missing or broken.
    """
    try:
        return from_bytes((folder / WEIGHTS).read_bytes())
    except (OSError, PeerError) as error:
        raise RegistryError(f"{folder / WEIGHTS} holds no parameters: {error}") from error
