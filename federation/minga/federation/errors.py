"""Everything that can go wrong in the federation.

    FederationError
    ├── EnrolmentError      a token or a device name was refused
    ├── IdentityError       a key or certificate is missing, foreign, expired or revoked
    │   └── AccessError     the identity is good, but its role may not do this
    ├── UnreachableError    the coordinator does not answer
    ├── PortInUseError      another process listens where this one should
    ├── CampaignError       a campaign cannot start, or ended without a result
    ├── StorageError        this machine's disk or database fails
    ├── AuditError          the audit log was altered, or is no audit log
    ├── TrainerError        the device's own training code failed
    ├── MissingBlobError    the store holds no blob of that digest
    ├── MissingDeviceError  no device of that name is enrolled
    ├── StepError           the mean update cannot be made a next global model
    ├── PlainRefusedError   the coordinator would see an update, and the device's owner forbids it
    ├── QueryRefusedError   the coordinator asks for what the device's owner does not let it tell
    ├── IneligibleError     this device does not meet what a campaign asks of devices
    ├── StrategyError       a Flower strategy fails, is not allowed, or wants what rounds cannot do
    ├── RuleError           too few contributions for the rule that combines them
    ├── PrivacyError        noise and bounds of differential privacy that cannot work together
    │   └── BudgetError     a round would spend more privacy than is left
    └── PeerError           the other side misbehaves: what it sent is refused
        └── LimitError      it sent too much

`minga.federation.secagg.errors` hangs its own branch below.
"""


class FederationError(Exception):
    """Base of all errors of the federation."""


class EnrolmentError(FederationError):
    """A token or a device name was refused."""


class IdentityError(FederationError):
    """A key or certificate is missing, foreign, expired or revoked."""


class AccessError(IdentityError):
    """The identity is good, but its role may not do this."""


class UnreachableError(FederationError):
    """The coordinator does not answer."""


class PortInUseError(FederationError):
    """Another process listens where this one should."""


class CampaignError(FederationError):
    """A campaign cannot start, or ended without a result."""


class StorageError(FederationError):
    """This machine's disk or database fails; what was not stored has not happened."""


class AuditError(FederationError):
    """The audit log was altered: an entry is changed, missing, moved or not signed as it should."""


class TrainerError(FederationError):
    """The device's own training code failed."""


class MissingBlobError(FederationError):
    """The store holds no blob of that digest."""


class MissingDeviceError(FederationError):
    """No device of that name is enrolled."""


class StepError(FederationError, ValueError):
    """The mean update cannot be made a next global model."""


class PlainRefusedError(FederationError):
    """The coordinator would see a single update, and the device's owner does not allow that."""


class NoiseRefusedError(FederationError):
    """The sum would have less noise in it than the device's owner wants to hide in."""


class QueryRefusedError(FederationError):
    """The coordinator asks about data of which the device's owner lets nothing be told."""


class IneligibleError(FederationError):
    """This device does not meet what a campaign asks of devices."""


class StrategyError(FederationError):
    """A Flower strategy fails, is not allowed here, or wants what a round cannot do."""


class RuleError(FederationError, ValueError):
    """There are too few sound contributions for the rule that combines them."""


class PrivacyError(FederationError, ValueError):
    """Noise and bounds of differential privacy that cannot work together."""


class BudgetError(PrivacyError):
    """A round would spend more privacy than is left."""


class PeerError(FederationError):
    """The other side misbehaves: what it sent is refused."""


class LimitError(PeerError):
    """The other side sent more than is allowed."""
