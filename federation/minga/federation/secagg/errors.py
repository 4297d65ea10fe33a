"""Everything that can go wrong in secure aggregation.

FederationError
├── StateError          our own program called a step out of order, or again with other input
├── PlanError           (ValueError) a plan that cannot work, or that is not safe
├── UpdateError         (ValueError) this device's own update cannot be encoded
├── QuorumError         too few neighbours are left; nobody need have misbehaved
└── PeerError
    └── ProtocolError   the other side misbehaves; `blamed` names whom the evidence points at
        ├── MessageError        malformed, of another round, doubled, or not asked for
        ├── SignatureError      not signed by the device that it names
        ├── EquivocationError   asked again with different words
        ├── ShareError          shares that rebuild no secret, or the wrong one
        └── SumError            the unmasked sum is not one of honestly encoded updates
"""

from collections.abc import Iterable

from minga.federation.errors import FederationError, PeerError


class StateError(FederationError):
    """Our own program called a step out of order, or again with other input."""


class PlanError(FederationError, ValueError):
    """A plan that cannot work, or that is not safe to follow."""


class UpdateError(FederationError, ValueError):
    """This device's own update cannot be encoded."""


class QuorumError(FederationError):
    """Too few neighbours are left for the round to go on."""


class ProtocolError(PeerError):
    """The other side misbehaves.

    Attributes:
        blamed: Devices that the evidence points at, sorted; empty where it points at the
            coordinator or at nobody in particular.
    """

    def __init__(self, message: str, blamed: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.blamed = tuple(sorted(blamed))


class MessageError(ProtocolError):
    """A message is malformed, of another round, doubled, or was not asked for."""


class SignatureError(ProtocolError):
    """A message is not signed by the device that it names."""


class EquivocationError(ProtocolError):
    """A step was asked for again with different words."""


class ShareError(ProtocolError):
    """Shares rebuild no secret, or not the one that was committed to."""


class SumError(ProtocolError):
    """The unmasked sum is not a sum of honestly encoded updates."""
