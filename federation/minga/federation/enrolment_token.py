"""The text that lets one device into a federation, and all that the device needs to know.

`minga-enrol-v1.<base64url(JSON)>`. The JSON holds the coordinator's two addresses, the secret, the
authority's certificate, which the device trusts from the first byte on, the intermediate that
issues in its name if the authority is an offline root, and a check sum of the rest: whoever loses a
character when copying is told so, instead of "unknown token".

Whoever reads the text may enrol: it is shown once and only the secret's hash is kept.
"""

import base64
import hashlib
import json
from binascii import Error as Base64Error
from dataclasses import dataclass, field
from typing import Final, Self

from cryptography import x509

from minga.federation.certificates import issuer_of, parse_certificate, trust_domain_of
from minga.federation.errors import EnrolmentError, IdentityError
from minga.federation.limits import MAX_TOKEN_CHARS, TOKEN_SECRET_BYTES

PREFIX: Final = "minga-enrol-v1."
_REMEDY: Final = "copy it again in full, or ask the operator for a new one"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnrolmentToken:
    """An enrolment token taken apart.

    Attributes:
        enrol_address: `host:port` where the token is redeemed.
        device_address: `host:port` of the control stream and the blobs.
        secret: What is redeemed, 32 random bytes.
        authority_der: Certificate of the authority that the coordinator must be known to.
        intermediate_der: Certificate of the intermediate that issues in the authority's name; empty
            if the authority issues itself.
    """

    enrol_address: str
    device_address: str
    secret: bytes = field(repr=False)
    authority_der: bytes = field(repr=False)
    intermediate_der: bytes = field(default=b"", repr=False)

    @property
    def authority(self) -> x509.Certificate:
        """The authority's certificate."""
        return parse_certificate(self.authority_der)

    @property
    def issuer(self) -> x509.Certificate:
        """Who must have issued the coordinator's certificate.

        Raises:
            IdentityError: the token's two certificates do not belong together.
        """
        intermediate = parse_certificate(self.intermediate_der) if self.intermediate_der else None
        return issuer_of(intermediate, self.authority)

    def to_text(self) -> str:
        """Write the token as one line for a person to copy."""
        content = {
            "enrol": self.enrol_address,
            "device": self.device_address,
            "secret": _encode(self.secret),
            "authority": _encode(self.authority_der),
        }
        if self.intermediate_der:
            content["intermediate"] = _encode(self.intermediate_der)
        content["check"] = _check_sum(content)
        return PREFIX + _encode(json.dumps(content, separators=(",", ":")).encode())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a token; line breaks and blanks that came in with copying are ignored.

        Raises:
            EnrolmentError: it is no token, of another version, truncated or garbled.
        """
        text = "".join(text.split())
        if not text.startswith(PREFIX):
            raise EnrolmentError(f"an enrolment token starts with {PREFIX!r}; {_REMEDY}")
        if len(text) > MAX_TOKEN_CHARS:
            raise EnrolmentError(f"a token of {len(text)} characters is too long; {_REMEDY}")
        try:
            content = json.loads(_decode(text.removeprefix(PREFIX)))
            check = content.pop("check")
            if check != _check_sum(content):
                raise EnrolmentError(f"the enrolment token was changed on its way; {_REMEDY}")
            return cls._of(content)
        except (Base64Error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EnrolmentError(
                f"the enrolment token is truncated or garbled; {_REMEDY}"
            ) from error

    @classmethod
    def _of(cls, content: dict[str, str]) -> Self:
        token = cls(
            enrol_address=content["enrol"],
            device_address=content["device"],
            secret=_decode(content["secret"]),
            authority_der=_decode(content["authority"]),
            intermediate_der=_decode(content.get("intermediate", "")),
        )
        if len(token.secret) != TOKEN_SECRET_BYTES:
            raise ValueError(f"a secret of {len(token.secret)} bytes")
        try:
            trust_domain_of(token.issuer)
        except IdentityError as error:
            raise EnrolmentError(f"the enrolment token pins no authority; {_REMEDY}") from error
        return token


def _check_sum(content: dict[str, str]) -> str:
    """Detect copying errors; not a signature: whoever makes a token may make this."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: str) -> bytes:
    padded = text + "=" * (-len(text) % 4)
    data = base64.b64decode(padded, altchars=b"-_", validate=True)
    if _encode(data) != text:  # bits beyond the last byte: a character was changed
        raise ValueError("not canonical base64")
    return data
