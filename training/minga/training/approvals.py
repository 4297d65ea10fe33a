"""Approval by other people than those who made and judged a version.

An approval is a signed statement about one version's files. It is kept as a tag of that version,
where whoever can write to the registry may put, copy or remove one; so only signatures count: by a
key whose approval counts today, over this very bundle and number, each key once, and never by a key
that registered or judged the same model. Removing a tag can hold a promotion up, and no more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from pydantic import ValidationError

from minga.training.document import Document
from minga.training.errors import ApprovalError, VerdictError
from minga.training.signing import Keyring, keyid_of

TAG = "minga.approval."
"""Begins the name of an approval's tag; the signer's key ends it."""

KIND = "application/vnd.minga.approval+json"

MAX_COMMENT = 500
"""Characters; a tag of MLflow holds 5,000 bytes."""


class Approval(Document):
    """What somebody signs who approves of a version."""

    model: str
    version: int
    bundle_sha256: str
    by: str
    """User and machine, as that machine says."""
    at: str
    comment: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How many approvals a promotion needs, and whose count.

    Attributes:
        needed: how many.
        approvers: public keys; empty: all that the keyring trusts.
    """

    needed: int = 0
    approvers: tuple[str, ...] = ()

    def keyring(self, keyring: Keyring) -> Keyring:
        """Give a keyring that believes those alone whose approval counts."""
        return Keyring(keyring.own, self.approvers) if self.approvers else keyring


@dataclass(frozen=True, slots=True, kw_only=True)
class Approvals:
    """The approvals of one version.

    Attributes:
        counted: public key -> the approval.
        refused: why others do not count.
    """

    counted: Mapping[str, Approval]
    refused: tuple[str, ...]

    @property
    def people(self) -> tuple[str, ...]:
        """Name those who approved, with their keys."""
        return tuple(f"{one.by} ({keyid_of(key)})" for key, one in self.counted.items())


def sign_approval(
    keyring: Keyring, policy: Policy, approval: Approval, authors: Iterable[str]
) -> tuple[str, str]:
    """Give the tag and the envelope of an approval by the keyring's own key.

    Raises:
        ApprovalError: the own key's approval would not count, or the comment is too long.
    """
    own = keyring.public_key
    what = f"{approval.model} version {approval.version}"
    if own in authors:
        raise ApprovalError(
            f"{what} was registered or judged with this machine's key ({keyid_of(own)}); somebody "
            "else has to approve it, with a key of their own"
        )
    if own not in policy.keyring(keyring).trusted:
        raise ApprovalError(
            f"this machine's key {own} is none of [gates] approvers, so its approval does not count"
        )
    if len(approval.comment) > MAX_COMMENT:
        raise ApprovalError(
            f"the comment has {len(approval.comment)} characters; write at most {MAX_COMMENT}"
        )
    return TAG + keyid_of(own), keyring.sign(KIND, approval.model_dump_json().encode())


def read_approvals(
    keyring: Keyring,
    policy: Policy,
    tags: Mapping[str, str],
    *,
    model: str,
    version: int,
    bundle_sha256: str,
    authors: Iterable[str],
) -> Approvals:
    """Check the approvals among a version's tags.

    Args:
        keyring: the trusted keys.
        policy: whose approval counts.
        tags: of the version.
        model: its name.
        version: its number.
        bundle_sha256: of its files.
        authors: public keys of those who made or judged it.
    """
    believed = policy.keyring(keyring)
    counted: dict[str, Approval] = {}
    refused = []
    for tag, envelope in sorted(tags.items()):
        if not tag.startswith(TAG):
            continue
        try:
            payload, signer = believed.open_signed(KIND, envelope)
            approval = Approval.model_validate_json(payload)
        except (VerdictError, ValidationError) as error:
            refused.append(f"{tag.removeprefix(TAG)}: {str(error).splitlines()[0]}")
            continue
        seen = (approval.model, approval.version, approval.bundle_sha256)
        if seen != (model, version, bundle_sha256):
            refused.append(f"{approval.by}: it is for {approval.model} version {approval.version}")
        elif signer in authors:
            refused.append(f"{approval.by}: the key also registered or judged the version")
        else:
            counted[signer] = approval
    return Approvals(counted=counted, refused=tuple(refused))


def require_approvals(found: Approvals, policy: Policy, *, model: str, version: int) -> None:
    """Refuse a version that too few people approved.

    Raises:
        ApprovalError: there are too few.
    """
    if len(found.counted) >= policy.needed:
        return
    given = f" ({', '.join(found.people)})" if found.counted else ""
    ignored = f"; not counted: {'; '.join(found.refused)}" if found.refused else ""
    raise ApprovalError(
        f"{model} version {version} has {len(found.counted)} of {policy.needed} approvals{given}"
        f"{ignored}; people other than those who registered and judged it approve it with: "
        f"minga model approve {version}"
    )
