"""The folder that a registered version carries.

model.onnx            preparation and model; `input` -> `output`
weights.safetensors   the network's parameters; reading them runs no code; absent if it is none
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
from minga.training.space import architecture_of, is_network
from minga.training.verdict import authors_of, check_verdict, sign_verdict

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
"""What the signed verdict covers. A model that is no network has no weights of its own."""

OWN_FILES = (*JUDGED_FILES, VERDICT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """All that a version carries, in memory."""

    onnx: bytes
    parameters: Parameters | None
    """None of a model that is no network."""
    schema: Schema
    profile: Profile
    gates: GateReport
    lineage: Lineage
    description: str = ""
    """What the model is for, in the Task's words."""
    authors: frozenset[str] = frozenset()
    """Public keys of those who made or judged the same model before."""

    def write(self, folder: Path, keyring: Keyring) -> None:
        """Write the folder, which must not exist, and vouch for it with the keyring's own key."""
        from minga.training.tracking import save_mlflow_model

        save_mlflow_model(self.onnx, folder)
        if self.parameters is not None:
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
        verdict = sign_verdict(
            keyring,
            self.lineage.task,
            folder,
            present(folder, JUDGED_FILES),
            self.gates,
            authors=self.authors,
        )
        (folder / VERDICT).write_text(verdict + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Digests:
    """SHA-256 of a bundle's parts and of the whole, in hexadecimal; `weights` may be empty."""

    onnx: str
    weights: str
    bundle: str

    @classmethod
    def of(cls, folder: Path, *, needs_weights: bool = False) -> Self:
        """Digest a bundle's folder.

        The whole covers the files that Minga reads. MLflow's own are left out: loading a model
        with MLflow adds one to the folder.

        Raises:
            RegistryError: one of the files is missing.
        """
        names = OWN_FILES if needs_weights else present(folder, OWN_FILES)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise RegistryError(f"{folder} is no whole bundle: it lacks {', '.join(missing)}")
        parts = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
        lines = "\n".join(f"{digest}  {name}" for name, digest in parts.items())
        return cls(
            onnx=parts[MODEL],
            weights=parts.get(WEIGHTS, ""),
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
    files = present(folder, JUDGED_FILES)
    check_verdict(keyring, model, folder, files, report=report, envelope=envelope)
    return report


def read_authors(folder: Path, keyring: Keyring) -> frozenset[str]:
    """Give the public keys of those who made or judged a bundle's model.

    Raises:
        VerdictError: no trusted key signed its verdict.
    """
    return authors_of(keyring, (folder / VERDICT).read_bytes())


def present(folder: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    """Leave weights out of a list of files if the bundle has none.

    Nobody gains by removing or adding them: the verdict and the registered digest are over the
    files that were there.
    """
    has = has_weights(folder)
    return tuple(name for name in files if name != WEIGHTS or has)


def has_weights(folder: Path) -> bool:
    """Tell whether a bundle's model is a network."""
    return (folder / WEIGHTS).is_file()


def read_parameters(folder: Path) -> Parameters:
    """Read a bundle's parameters.

    Raises:
        RegistryError: the model is no network and has none, or the file is broken.
    """
    if not has_weights(folder) and (folder / LINEAGE).is_file():
        params = Lineage.read(folder / LINEAGE).params
        if not is_network(params):
            raise RegistryError(
                f"the version is no network but {architecture_of(params)!r}: it has no weights, so "
                "it cannot be federated, trained further or simulated; for that, register a "
                'network: minga run, or minga run --auto with [selection] contenders = ["own", '
                '"linear", "mlp"]'
            )
    try:
        return from_bytes((folder / WEIGHTS).read_bytes())
    except (OSError, PeerError) as error:
        raise RegistryError(f"{folder / WEIGHTS} holds no parameters: {error}") from error
