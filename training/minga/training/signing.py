"""Who vouches for a verdict: Ed25519 keys, and signed statements in DSSE envelopes.

Whoever can write to the registry can set its tags and aliases: MLflow guards neither. So what
decides over production is signed by a key that is not in the registry, and is believed only if
the key is this project's own or is named in `[gates] trusted_keys`.

The envelope is DSSE 1.0 (Secure Systems Lab, https://github.com/secure-systems-lab/dsse): what is
signed covers the payload's type, so a statement of one kind cannot be shown as one of another.
"""

import base64
import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from minga.federation.durable import PRIVATE, create_file
from minga.training.errors import VerdictError

_PREFIX = "ed25519:"


@dataclass(frozen=True, slots=True)
class Keyring:
    """The own key, which signs, and the public keys that are believed, the own one among them."""

    own: Ed25519PrivateKey = field(repr=False)
    trusted: tuple[str, ...]

    @classmethod
    def open(cls, file: Path, trusted: Iterable[str] = ()) -> Self:
        """Read the own key; it is made the first time, readable by its owner alone.

        Args:
            file: of the private key, PKCS#8 in PEM.
            trusted: public keys of others, as `public_key` writes them.

        Raises:
            VerdictError: the file holds no Ed25519 key, or a public key is none.
        """
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another process's came first: it counts
                create_file(file, _pem(Ed25519PrivateKey.generate()), mode=PRIVATE)
        own = _read(file)
        names = tuple(dict.fromkeys((_name(own.public_key()), *trusted)))
        for name in names:
            _public(name)
        return cls(own, names)

    @property
    def public_key(self) -> str:
        """What others name in `trusted_keys` to believe this key."""
        return self.trusted[0]

    def sign(self, kind: str, payload: bytes) -> str:
        """Put a payload of a kind into a signed envelope, JSON on one line."""
        signature = self.own.sign(_encode(kind, payload))
        envelope = {
            "payloadType": kind,
            "payload": base64.b64encode(payload).decode(),
            "signatures": [
                {"keyid": keyid_of(self.public_key), "sig": base64.b64encode(signature).decode()}
            ],
        }
        return json.dumps(envelope)

    def open_envelope(self, kind: str, envelope: str | bytes) -> bytes:
        """Give an envelope's payload, if a trusted key signed it as this kind.

        Raises:
            VerdictError: it is no envelope, of another kind, altered, or signed by a stranger.
        """
        return self.open_signed(kind, envelope)[0]

    def open_signed(self, kind: str, envelope: str | bytes) -> tuple[bytes, str]:
        """Give an envelope's payload, and the public key that signed it.

        Raises:
            VerdictError: it is no envelope, of another kind, altered, or signed by a stranger.
        """
        try:
            parts = json.loads(envelope)
            payload = base64.b64decode(parts["payload"], validate=True)
            signatures = {
                str(one["keyid"]): base64.b64decode(one["sig"], validate=True)
                for one in parts["signatures"]
            }
            found = str(parts["payloadType"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise VerdictError(f"the signed statement cannot be read: {error!r}") from error
        if found != kind:
            raise VerdictError(f"the signed statement is a {found!r}, not a {kind!r}")
        keys = {keyid_of(name): name for name in self.trusted}
        for keyid in signatures.keys() & keys.keys():
            try:
                _public(keys[keyid]).verify(signatures[keyid], _encode(kind, payload))
            except InvalidSignature:
                raise VerdictError(
                    "the signed statement was altered after it was signed; do not use it"
                ) from None
            return payload, keys[keyid]
        raise VerdictError(
            f"the statement is signed by {', '.join(sorted(signatures)) or 'nobody'}, which is no "
            "trusted key; if it is a colleague's, add what their `minga model key` prints to "
            "[gates] trusted_keys"
        )


def _encode(kind: str, payload: bytes) -> bytes:
    """Write what is signed: DSSE's pre-authentication encoding (protocol.md, "PAE")."""
    return b"DSSEv1 %d %s %d %s" % (len(kind.encode()), kind.encode(), len(payload), payload)


def keyid_of(name: str) -> str:
    """Give the short name of a public key, which envelopes name their signer by."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _name(key: Ed25519PublicKey) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _PREFIX + base64.b64encode(raw).decode()


def _public(name: str) -> Ed25519PublicKey:
    try:
        if not name.startswith(_PREFIX):
            raise ValueError("no Ed25519 key")
        raw = base64.b64decode(name.removeprefix(_PREFIX), validate=True)
        return Ed25519PublicKey.from_public_bytes(raw)
    except ValueError as error:
        raise VerdictError(
            f"{name!r} is no public key: {error}; write what `minga model key` prints"
        ) from error


def _pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _read(file: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise VerdictError(f"{file} holds no private key: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise VerdictError(f"{file} holds a key of another kind; an Ed25519 key is needed")
    return key
