"""Whole rounds in one process: real keys, real signatures, a coordinator without a network.

A `Simulation` goes through a round step by step. Between steps a test may change what lies on the
coordinator's table (`adverts`, `shares`, `uploads`, `confirmations`, `reveals`) or what it hands
out, and so play any liar. Updates lie on the fixed-point grid, so sums are exact.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import shake_256

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from minga.federation.errors import IdentityError
from minga.federation.secagg.coordinator import (
    MaskedSum,
    Unmasked,
    can_unmask,
    check_advert,
    check_confirmation,
    check_reveal,
    check_shares,
    unmask,
)
from minga.federation.secagg.device import DeviceSession, Step
from minga.federation.secagg.graph import neighbours
from minga.federation.secagg.masking import apply_masks_threaded
from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare, Reveal
from minga.federation.secagg.plan import RoundPlan

WEIGHT_UNIT = 16
"""The simulation's max_weight; updates are multiples of it, so that weighing is exact."""


def seeded_bytes(seed: object) -> Callable[[int], bytes]:
    """Make a repeatable stand-in for os.urandom."""
    position = 0

    def draw(num_bytes: int) -> bytes:
        nonlocal position
        position += 1
        return shake_256(f"{seed}/{position}".encode()).digest(num_bytes)

    return draw


class Signer:
    """A device's identity: Ed25519, the certificate is the public key."""

    def __init__(self, device_id: str, seed: object) -> None:
        self.device_id = device_id
        self._key = Ed25519PrivateKey.from_private_bytes(seeded_bytes((seed, device_id))(32))
        self.certificate_der = self._key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self._key.sign(message)


@dataclass(frozen=True)
class Registry:
    """Who belongs to the federation: device -> certificate."""

    certificates: Mapping[str, bytes]

    def verify(self, device_id: str, certificate: bytes, signature: bytes, message: bytes) -> None:
        if self.certificates.get(device_id) != certificate:
            raise IdentityError(f"the certificate is not of {device_id!r}")
        try:
            Ed25519PublicKey.from_public_bytes(certificate).verify(signature, message)
        except InvalidSignature as error:
            raise IdentityError(f"the signature is not by {device_id!r}") from error


def names(num_devices: int) -> list[str]:
    """Name some devices."""
    return [f"device-{number:02}" for number in range(num_devices)]


def make_plan(num_devices: int = 8, **changes: object) -> RoundPlan:
    """Make a plan over the complete graph whose fixed-point step is exactly one."""
    degree = int(changes.get("num_neighbours", num_devices - 1))
    numbers = {
        "round_id": bytes(range(16)),
        "context_digest": bytes(32),
        "num_values": 37,
        "max_cohort": num_devices,
        "num_neighbours": degree,
        "threshold": degree // 2 + 1,
        "value_bits": 20,
        "clip": float(2**19 - 1),
        "max_weight": WEIGHT_UNIT,
    }
    return RoundPlan(**(numbers | changes))


@dataclass
class Simulation:
    """One round.

    `lost_before` names devices that vanish, and the step that they do not take any more.
    """

    plan: RoundPlan = field(default_factory=make_plan)
    lost_before: Mapping[str, Step] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.ids = names(self.plan.max_cohort)
        self.signers = {name: Signer(name, self.seed) for name in self.ids}
        self.registry = Registry({n: s.certificate_der for n, s in self.signers.items()})
        self.sessions = {
            name: DeviceSession(
                self.plan, self.signers[name], self.registry, seeded_bytes((self.seed, name))
            )
            for name in self.ids
        }
        self.deltas = {name: self._draw_update(name) for name in self.ids}
        self.weights = {
            name: 1 + seeded_bytes((self.seed, name, "weight"))(1)[0] % WEIGHT_UNIT
            for name in self.ids
        }
        self.graph: dict[str, tuple[str, ...]] = {}
        self.adverts: dict[str, Advert] = {}
        self.shares: dict[str, tuple[EncryptedShare, ...]] = {}
        self.uploads: dict[str, bytes] = {}
        self.confirmations: dict[str, Confirmation] = {}
        self.reveals: dict[str, Reveal] = {}

    def _draw_update(self, name: str) -> NDArray[np.float32]:
        drawn = seeded_bytes((self.seed, name, "update"))(2 * self.plan.num_values)
        steps = np.frombuffer(drawn, "<u2").astype(np.int32) % 201 - 100
        return (WEIGHT_UNIT * steps).astype(np.float32)

    # -- who is there --

    def present(self, step: Step, among: Sequence[str]) -> list[str]:
        return [n for n in among if self.lost_before.get(n, Step.REVEAL + 1) > step]

    @property
    def sharers(self) -> list[str]:
        return sorted(self.shares)

    @property
    def survivors(self) -> list[str]:
        return sorted(self.uploads)

    # -- what a device is handed --

    def adverts_for(self, name: str) -> list[Advert]:
        return [self.adverts[peer] for peer in self.graph[name]]

    def inbox(self, name: str) -> list[EncryptedShare]:
        return [
            share
            for peer in self.graph[name]
            for share in self.shares.get(peer, ())
            if share.receiver == name
        ]

    def confirmations_for(self, name: str) -> list[Confirmation]:
        return [self.confirmations[peer] for peer in self.graph[name] if peer in self.confirmations]

    def masked(self, name: str) -> bytes:
        session = self.sessions[name]
        return session.mask(self.inbox(name), self.deltas[name], self.weights[name])

    # -- the steps --

    def advertise(self) -> "Simulation":
        for name in self.present(Step.ADVERTISE, self.ids):
            self.adverts[name] = self.sessions[name].advertise()
            check_advert(self.plan, self.registry, self.adverts[name])
        self.graph = neighbours(self.adverts, self.plan.num_neighbours, self.plan.round_id)
        return self

    def share(self) -> "Simulation":
        for name in self.present(Step.SHARE, sorted(self.adverts)):
            self.shares[name] = self.sessions[name].share(self.adverts_for(name))
            check_shares(self.graph, name, self.shares[name])
        return self

    def mask(self) -> "Simulation":
        for name in self.present(Step.MASK, self.sharers):
            self.uploads[name] = self.masked(name)
        return self

    def confirm(self) -> "Simulation":
        for name in self.present(Step.CONFIRM, self.survivors):
            confirmation = self.sessions[name].confirm(self.survivors)
            self.confirmations[name] = confirmation
            check_confirmation(
                self.plan, self.registry, self.adverts[name], self.survivors, confirmation
            )
        return self

    def reveal(self) -> "Simulation":
        for name in self.present(Step.REVEAL, sorted(self.confirmations)):
            self.reveals[name] = self.sessions[name].reveal(self.confirmations_for(name))
            check_reveal(self.graph, self.sharers, self.survivors, self.reveals[name])
        return self

    def until(self, step: Step) -> "Simulation":
        """Take all steps up to and with this one."""
        steps = [self.advertise, self.share, self.mask, self.confirm, self.reveal]
        for take in steps[:step]:
            take()
        return self

    # -- the end --

    def can_unmask(self) -> bool:
        return can_unmask(self.plan, self.graph, self.sharers, self.survivors, self.reveals)

    def unmask(self) -> Unmasked:
        total = MaskedSum(self.plan)
        for upload in self.uploads.values():
            total.add(upload)
        return unmask(
            plan=self.plan,
            graph=self.graph,
            adverts=self.adverts,
            sharers=self.sharers,
            survivors=self.survivors,
            reveals=self.reveals,
            masked_sum=total,
            apply=partial(apply_masks_threaded, num_threads=2),
        )

    def run(self) -> Unmasked:
        return self.until(Step.REVEAL).unmask()

    # -- the truth --

    def true_weight(self) -> int:
        return sum(self.weights[name] for name in self.survivors)

    def true_mean(self) -> NDArray[np.float32]:
        """Give the weighted mean over the survivors, from sums of whole numbers."""
        levels = [self.deltas[n].astype(int) * self.weights[n] for n in self.survivors]
        total = np.sum(levels, axis=0) // WEIGHT_UNIT
        return (total * (WEIGHT_UNIT / self.true_weight())).astype(np.float32)
