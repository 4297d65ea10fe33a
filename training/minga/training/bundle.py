"""The folder that a registered version carries.

model.onnx            preparation and model; `input` -> `output`
weights.safetensors   the network's parameters; reading them runs no code
schema.json           what valid data looks like
profile.json          the reference profile: inputs, targets, outputs
gates.json            the verdict, whatever it was
lineage.json          data, code, environment, parameters, parent
environment.txt       all packages and their versions, as pip reads them
README.md, card.json  the model card, for people and for programs
verdict.json          the signed statement that these very files got this very verdict
MLmodel, ...          so that MLflow's own tools load it too
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from minga.federation.errors import PeerError
from minga.federation.parameters import Parameters, from_bytes, to_bytes
from minga.training.card import Card
from minga.training.errors import RegistryError
from minga.training.gates import GateReport
from minga.training.lineage import Lineage, installed_packages
from minga.training.profile import Profile
from minga.training.schema import Schema
from minga.training.signing import Keyring
from minga.training.verdict import check_verdict, sign_verdict

MODEL = "model.onnx"
WEIGHTS = "weights.safetensors"
SCHEMA = "schema.json"
PROFILE = "profile.json"
GATES = "gates.json"
LINEAGE = "lineage.json"
ENVIRONMENT = "environment.txt"
CARD = "README.md"
CARD_JSON = "card.json"

VERDICT = "verdict.json"

JUDGED_FILES = (
    CARD,
    CARD_JSON,
    ENVIRONMENT,
    GATES,
    LINEAGE,
    MODEL,
    PROFILE,
    SCHEMA,
    WEIGHTS,
)
"""What the signed verdict covers."""

OWN_FILES = (*JUDGED_FILES, VERDICT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """All that a version carries, in memory."""

    onnx: bytes
    parameters: Parameters
    schema: Schema
    profile: Profile
    gates: GateReport
    lineage: Lineage
    description: str = ""
    """What the model is for, in the Task's words."""

    def write(self, folder: Path, keyring: Keyring) -> None:
        """Write the folder, which must not exist, and vouch for it with the keyring's own key."""
        from minga.training.tracking import save_mlflow_model

        save_mlflow_model(self.onnx, folder)
        (folder / WEIGHTS).write_bytes(to_bytes(self.parameters))
        self.schema.write(folder / SCHEMA)
        self.profile.write(folder / PROFILE)
        self.gates.write(folder / GATES)
        self.lineage.write(folder / LINEAGE)
        (folder / ENVIRONMENT).write_text(installed_packages(), encoding="utf-8")
        card = Card(
            description=self.description,
            data_schema=self.schema,
            profile=self.profile,
            gates=self.gates,
            lineage=self.lineage,
        )
        card.write(folder / CARD_JSON)
        (folder / CARD).write_text(card.markdown(), encoding="utf-8")
        verdict = sign_verdict(keyring, self.lineage.task, folder, JUDGED_FILES, self.gates)
        (folder / VERDICT).write_text(verdict + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """SHA-256 of a bundle's parts and of the whole, in hexadecimal."""

    onnx: str
    weights: str
    bundle: str

    @classmethod
    def of(cls, folder: Path) -> Self:
        """Digest a bundle's folder.

        The whole covers the files that Minga reads. MLflow's own are left out: loading a model
        with MLflow adds one to the folder.

        Raises:
            RegistryError: one of the files is missing.
        """
        missing = [name for name in OWN_FILES if not (folder / name).is_file()]
        if missing:
            raise RegistryError(f"{folder} is no whole bundle: it lacks {', '.join(missing)}")
        parts = {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in OWN_FILES
        }
        lines = "\n".join(f"{digest}  {name}" for name, digest in parts.items())
        return cls(
            onnx=parts[MODEL],
            weights=parts[WEIGHTS],
            bundle=hashlib.sha256(lines.encode()).hexdigest(),
        )


def read_verdict(folder: Path, model: str, keyring: Keyring) -> GateReport:
    """Read a bundle's gate report, if a trusted key vouches for it and for all files around it.

    Raises:
        VerdictError: none does.
        RegistryError: a file is missing or broken.
    """
    report = GateReport.read(folder / GATES)
    envelope = (folder / VERDICT).read_bytes()
    check_verdict(keyring, model, folder, JUDGED_FILES, report=report, envelope=envelope)
    return report


def read_parameters(folder: Path) -> Parameters:
    """Read a bundle's parameters.

    Raises:
        RegistryError: the file is missing or broken.
    """
    try:
        return from_bytes((folder / WEIGHTS).read_bytes())
    except (OSError, PeerError) as error:
        raise RegistryError(f"{folder / WEIGHTS} holds no parameters: {error}") from error
