"""What a device has to do next in a round."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from minga.federation.coordinator.rounds.order import RoundOrder
from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare


@dataclass(frozen=True, slots=True, kw_only=True)
class TakePart:
    """Fetch the model, start training; send keys, or in a plain round the update."""

    order: RoundOrder


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareSecrets:
    """Here are your neighbours' keys: share your secrets among them."""

    adverts: tuple[Advert, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendUpdate:
    """Here are the shares made for you: mask your update and upload it."""

    shares: tuple[EncryptedShare, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmSurvivors:
    """These devices are in the sum: sign that you saw this list."""

    survivors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RevealShares:
    """This is what your neighbours signed: reveal your shares."""

    confirmations: tuple[Confirmation, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The round is over for you."""

    committed: bool
    counted: bool
    reason: str


def finish(
    device_id: str,
    *,
    committed: bool,
    survivors: Collection[str],
    lost: Mapping[str, str],
    reason: str,
) -> Finish:
    """Say how a round ended for one of its devices; why, unless it is in the sum."""
    counted = committed and device_id in survivors
    return Finish(
        committed=committed,
        counted=counted,
        reason="" if counted else lost.get(device_id, reason),
    )


Instruction = TakePart | ShareSecrets | SendUpdate | ConfirmSurvivors | RevealShares | Finish
