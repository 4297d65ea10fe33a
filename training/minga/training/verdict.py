"""The signed verdict: which files were judged, as which model, and what came of it.

It is an in-toto statement (in-toto Attestation Framework v1): its subjects are the digests of all
of the bundle's other files, so that the verdict of one version cannot be shown for another.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from minga.training.errors import VerdictError
from minga.training.gates import GateReport
from minga.training.signing import Keyring

KIND = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "tag:minga,2026:gate-verdict/v1"


def sign_verdict(
    keyring: Keyring,
    model: str,
    folder: Path,
    files: tuple[str, ...],
    report: GateReport,
    *,
    authors: frozenset[str] = frozenset(),
) -> str:
    """Vouch for a bundle's files with the verdict on them.

    Args:
        keyring: its own key signs.
        model: the registered model's name.
        folder: of the bundle.
        files: all that the verdict covers, the gate report among them.
        report: the verdict.
        authors: public keys of those who made or judged this model before.
    """
    statement = {
        "_type": STATEMENT,
        "subject": _subjects(folder, files),
        "predicateType": PREDICATE,
        "predicate": {
            "model": model,
            "blessed": report.blessed,
            "champion": report.champion,
            "refused": [gate.name for gate in report.refused],
            "authors": sorted({*authors, keyring.public_key}),
        },
    }
    return keyring.sign(KIND, json.dumps(statement, sort_keys=True).encode())


def check_verdict(
    keyring: Keyring,
    model: str,
    folder: Path,
    files: tuple[str, ...],
    *,
    report: GateReport,
    envelope: bytes,
) -> None:
    """Check that a trusted key vouched for exactly these files with exactly this verdict.

    Raises:
        VerdictError: nobody who is trusted did.
    """
    statement: dict[str, Any] = json.loads(keyring.open_envelope(KIND, envelope))
    if statement.get("predicateType") != PREDICATE:
        raise VerdictError(f"the statement is no verdict but {statement.get('predicateType')!r}")
    predicate = statement["predicate"]
    if predicate["model"] != model:
        raise VerdictError(f"the verdict is on the model {predicate['model']!r}, not on {model!r}")
    if statement["subject"] != _subjects(folder, files):
        raise VerdictError(
            "the verdict is on other files than these: they were exchanged after they were "
            "judged; do not use them"
        )
    if (predicate["blessed"], predicate["champion"]) != (report.blessed, report.champion):
        raise VerdictError("the verdict and the gate report differ; do not use this version")


def authors_of(keyring: Keyring, envelope: bytes) -> frozenset[str]:
    """Give the public keys of those who made or judged what a verdict is on.

    Raises:
        VerdictError: no trusted key signed it.
    """
    payload, signer = keyring.open_signed(KIND, envelope)
    return frozenset({*json.loads(payload)["predicate"].get("authors", ()), signer})


def _subjects(folder: Path, files: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "digest": {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()},
        }
        for name in files
    ]
