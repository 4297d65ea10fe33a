"""What happens to a round: it is a function of these alone."""

from dataclasses import dataclass

from minga.federation.coordinator.rounds.order import Stage
from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare, Reveal


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysAdvertised:
    """A device takes part, with these keys."""

    device_id: str
    advert: Advert


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesSent:
    """A device shared its secrets among its neighbours."""

    device_id: str
    shares: tuple[EncryptedShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateUploaded:
    """A device's masked update is stored whole, under this digest."""

    device_id: str
    digest: bytes
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainUpdateUploaded:
    """A device's update of a plain round is stored whole, under this digest."""

    device_id: str
    digest: bytes
    size: int
    num_examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SurvivorsConfirmed:
    """A device signed the list of survivors."""

    device_id: str
    confirmation: Confirmation


@dataclass(frozen=True, slots=True, kw_only=True)
class SharesRevealed:
    """A device revealed its neighbours' shares."""

    device_id: str
    reveal: Reveal


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLost:
    """A device withdrew, was revoked, or stayed away too long."""

    device_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadlinePassed:
    """The time of a stage is up."""

    stage: Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class SumComputed:
    """The round's result is stored: the next global model, and what the server optimiser keeps."""

    model_digest: bytes
    total_weight: int
    optimizer_digest: bytes = b""
    rejected: tuple[tuple[str, str], ...] = ()
    """Devices whose updates turned out to be unusable, each with the reason."""
    metrics: tuple[tuple[str, float], ...] = ()
    """What an evaluation came to; its model is the one that it measured."""
    answer: tuple[float, ...] = ()
    """What a question came to; there is no model then."""
    liars: tuple[str, ...] = ()
    """Devices whose false shares were left out when the sum was unmasked."""
    max_norm: float = 0.0
    """The bound on updates' lengths with which a private campaign goes on; 0: it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFailed:
    """The round cannot go on."""

    reason: str


AnyUpdate = UpdateUploaded | PlainUpdateUploaded
Answer = KeysAdvertised | SharesSent | AnyUpdate | SurvivorsConfirmed | SharesRevealed
DeviceEvent = Answer | DeviceLost
Event = DeviceEvent | DeadlinePassed | SumComputed | RoundFailed
