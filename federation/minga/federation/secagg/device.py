"""A device's side of one round.

    advertise -> share -> mask -> confirm -> reveal

Rules:

1. A step is taken once. Asked again with the same input it gives the same answer, so a coordinator
   that was restarted may ask again; asked with other input it refuses.
2. A refused step changes nothing.
3. A peer's keys are used only if the peer signed them for this plan.
4. A pairwise mask is applied for exactly those neighbours whose shares arrived.
5. Of each neighbour one secret's share is revealed, never both: which one follows from the list of
   survivors, there is one such list in the life of a session, and it counts only once `threshold`
   neighbours have signed it (Bonawitz et al., figure 4, rounds 3 and 4).
6. Secrets are dropped as soon as no later step needs them. A session does not outlive its process:
   a device that restarts has dropped out of the round.

Not here: training, files, sockets, time limits.
"""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minga.federation.secagg import agreement, shamir, signing
from minga.federation.secagg.agreement import KeyPair, PeerShares
from minga.federation.secagg.errors import (
    EquivocationError,
    MessageError,
    PlanError,
    QuorumError,
    ShareError,
    SignatureError,
    StateError,
)
from minga.federation.secagg.fixedpoint import encode_update
from minga.federation.secagg.masking import apply_masks
from minga.federation.secagg.messages import Advert, Confirmation, EncryptedShare, Reveal
from minga.federation.secagg.packing import pack
from minga.federation.secagg.plan import RoundPlan
from minga.federation.secagg.signing import Identity, Verifier
from minga.federation.secagg.sizing import MIN_COHORT

_Message = TypeVar("_Message")

Encode = Callable[[RoundPlan, NDArray[np.float32], int, Callable[[int], bytes]], NDArray[np.uint32]]
"""Makes levels of an update, as `fixedpoint.encode_update` does."""


class Step(IntEnum):
    """How far a session is: the last step taken."""

    NONE = 0
    ADVERTISE = 1
    SHARE = 2
    MASK = 3
    CONFIRM = 4
    REVEAL = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class _Masking:
    """The secrets that masks are made from."""

    self_seed: bytes = field(repr=False)
    mask_pair: KeyPair


class DeviceSession:
    """One device in one round. Not safe for threads.

    Args:
        plan: The round's numbers, made from what the device itself was told.
        identity: The device's name and signing key.
        verifier: Says which devices belong to the federation.
        random_bytes: Source of randomness.
        min_summed: The fewest updates, its own included, among which this site agrees to hide.

    Raises:
        PlanError: the plan may end in a sum over fewer updates than `min_summed`.
    """

    def __init__(
        self,
        plan: RoundPlan,
        identity: Identity,
        verifier: Verifier,
        random_bytes: Callable[[int], bytes] = os.urandom,
        *,
        min_summed: int = MIN_COHORT,
    ) -> None:
        if plan.threshold + 1 < min_summed:
            raise PlanError(
                f"the round may sum as few as {plan.threshold + 1} updates; this site wants "
                f"{min_summed} or more"
            )
        self._plan = plan
        self._identity = identity
        self._verifier = verifier
        self._random_bytes = random_bytes
        self._step = Step.NONE
        self._masking: _Masking | None = None
        self._share_pair: KeyPair | None = None
        self._advert: Advert | None = None
        self._peers: dict[str, Advert] = {}
        self._sent: tuple[EncryptedShare, ...] = ()
        self._inbox: dict[str, EncryptedShare] = {}
        self._update: tuple[NDArray[np.float32], int] | None = None
        self._upload = b""
        self._survivors: tuple[str, ...] = ()
        self._confirmation: Confirmation | None = None
        self._reveal: Reveal | None = None

    @property
    def step(self) -> Step:
        """The last step taken."""
        return self._step

    # -- round 0: keys ------------------------------------------------------------------------

    def advertise(self) -> Advert:
        """Make this round's keys and sign them."""
        if self._advert is None:
            plan, seed = self._plan, self._random_bytes(shamir.SECRET_BYTES)
            masking = _Masking(self_seed=seed, mask_pair=agreement.generate(self._random_bytes))
            share_pair = agreement.generate(self._random_bytes)
            commitment = agreement.commit_seed(plan, self._identity.device_id, seed)
            self._advert = signing.sign_advert(
                plan, self._identity, masking.mask_pair.public, share_pair.public, commitment
            )
            self._masking, self._share_pair = masking, share_pair
            self._step = Step.ADVERTISE
        return self._advert

    # -- round 1: shares ----------------------------------------------------------------------

    def share(self, adverts: Iterable[Advert]) -> tuple[EncryptedShare, ...]:
        """Share both secrets among the neighbours that advertised keys.

        Args:
            adverts: One for each neighbour in the masking graph, as far as it came so far.

        Returns:
            One message for each neighbour.

        Raises:
            StateError: `advertise` has not been called.
            EquivocationError: called before with other adverts.
            MessageError: a neighbour is there twice, is this device, or has this device's keys.
            SignatureError: an advert is not signed for this plan by the device that it names.
            QuorumError: fewer neighbours than the threshold.
        """
        peers = _by_name(adverts, "the advert", lambda advert: advert.device_id)
        if self._step >= Step.SHARE:
            _same(peers == self._peers, "other neighbours")
            return self._sent
        own = self._after(Step.ADVERTISE)
        self._check_adverts(own, peers)
        self._sent = self._seal_secrets(own, peers)
        self._peers = peers
        self._step = Step.SHARE
        return self._sent

    def _check_adverts(self, own: Advert, peers: dict[str, Advert]) -> None:
        if own.device_id in peers:
            raise MessageError(f"{own.device_id} was given itself as a neighbour")
        if len(peers) > self._plan.num_neighbours:
            raise MessageError(
                f"{len(peers)} neighbours were named, the plan has {self._plan.num_neighbours}"
            )
        self._check_quorum(len(peers), "advertised keys")
        own_keys = {own.mask_key, own.share_key}
        for peer in peers.values():
            signing.check_advert(self._plan, self._verifier, peer)
            if own_keys & {peer.mask_key, peer.share_key}:
                raise MessageError(
                    f"{peer.device_id} advertised the keys of {own.device_id}", [peer.device_id]
                )

    def _seal_secrets(self, own: Advert, peers: dict[str, Advert]) -> tuple[EncryptedShare, ...]:
        assert self._masking is not None
        assert self._share_pair is not None
        places = {name: agreement.share_place(name) for name in peers}
        seeds, keys = (
            shamir.split(secret, self._plan.threshold, list(places.values()), self._random_bytes)
            for secret in (self._masking.self_seed, self._masking.mask_pair.secret)
        )
        return tuple(
            agreement.seal_shares(
                self._plan,
                self._share_pair,
                own,
                peer,
                shares=PeerShares(self_seed=seeds[places[name]], mask_key=keys[places[name]]),
                random_bytes=self._random_bytes,
            )
            for name, peer in peers.items()
        )

    # -- round 2: the masked update -----------------------------------------------------------

    def mask(
        self,
        inbox: Iterable[EncryptedShare],
        delta: NDArray[np.float32],
        weight: int,
        encode: Encode = encode_update,
    ) -> bytes:
        """Mask the update against every neighbour whose shares arrived.

        Args:
            inbox: What the neighbours that shared sealed for this device.
            delta: The update, float32, shape `(num_values,)`; kept, and not to be changed any more.
            weight: How much it counts, 1 to `max_weight`.
            encode: Makes levels of the update; another one may add noise.

        Returns:
            The upload, `plan.upload_size` bytes: uniform bits to anyone without the masks.

        Raises:
            StateError: `share` comes first; or called before with another update: one mask must
                never cover two.
            EquivocationError: called before with other shares.
            MessageError: shares for or from somebody else, or doubled.
            QuorumError: fewer neighbours shared than the threshold.
            UpdateError: the update cannot be encoded.
        """
        received = _by_name(inbox, "the shares", lambda message: message.sender)
        if self._update is not None:
            _same(received == self._inbox, "other shares")
            masked, its_weight = self._update
            if weight != its_weight or not np.array_equal(delta, masked):
                raise StateError("another update was masked in this round already")
            return self._upload
        own = self._after(Step.SHARE)
        self._check_inbox(own, received)
        levels = encode(self._plan, delta, weight, self._random_bytes)
        self._mask_levels(own, received, levels)
        self._upload = pack(levels, self._plan.ring_bits)
        self._update, self._inbox = (delta, weight), received
        self._masking = None
        self._step = Step.MASK
        return self._upload

    def _check_inbox(self, own: Advert, received: dict[str, EncryptedShare]) -> None:
        for sender, message in received.items():
            if message.receiver != own.device_id:
                raise MessageError(f"shares for {message.receiver} came to {own.device_id}")
            if sender not in self._peers:
                raise MessageError(f"shares came from {sender}, which is no neighbour")
        self._check_quorum(len(received), "shared their secrets")

    def _mask_levels(
        self, own: Advert, received: dict[str, EncryptedShare], levels: NDArray[np.uint32]
    ) -> None:
        """Add the self mask and the pairwise masks (Bonawitz et al., figure 4, round 2)."""
        assert self._masking is not None
        pair = self._masking.mask_pair
        masks = [agreement.self_mask(self._plan, own.device_id, self._masking.self_seed)]
        masks += [
            agreement.pair_mask(self._plan, pair, own, self._peers[name]) for name in received
        ]
        apply_masks(levels, masks)

    # -- round 3: one list of survivors -------------------------------------------------------

    def confirm(self, survivors: Iterable[str]) -> Confirmation:
        """Sign the list of devices whose updates are in the sum.

        Args:
            survivors: All of them, not only neighbours.

        Raises:
            StateError: `mask` comes first.
            EquivocationError: another list was signed already.
            MessageError: the list names a device twice or too many, leaves this device out, or has
                a neighbour that did not share its secrets.
            QuorumError: fewer surviving neighbours than the threshold.
        """
        listed = tuple(survivors)
        if self._confirmation is not None:
            _same(tuple(sorted(listed)) == self._survivors, "another list of survivors")
            return self._confirmation
        own = self._after(Step.MASK)
        self._check_survivors(own, listed)
        self._survivors = tuple(sorted(listed))
        self._confirmation = signing.sign_survivors(self._plan, self._identity, listed)
        self._step = Step.CONFIRM
        return self._confirmation

    def _check_survivors(self, own: Advert, listed: tuple[str, ...]) -> None:
        names = set(listed)
        if len(names) != len(listed) or len(names) > self._plan.max_cohort:
            raise MessageError(
                f"the list of survivors names {len(listed)} devices, {len(names)} different ones; "
                f"at most {self._plan.max_cohort} are in the round"
            )
        if own.device_id not in names:
            raise MessageError(f"the list of survivors leaves out {own.device_id}, which uploaded")
        silent = sorted(names & (self._peers.keys() - self._inbox.keys()))
        if silent:
            raise MessageError(f"{silent} are said to survive, but never shared their secrets")
        self._check_quorum(len(names & self._inbox.keys()), "survived")

    # -- round 4: unmasking -------------------------------------------------------------------

    def reveal(self, confirmations: Iterable[Confirmation]) -> Reveal:
        """Reveal one share for each neighbour, once enough of them signed the same list.

        Args:
            confirmations: Of surviving neighbours.

        Raises:
            StateError: `confirm` comes first.
            MessageError: a confirmation is doubled, or not of a surviving neighbour.
            SignatureError: too few are valid, and some are forged or of another list.
            QuorumError: too few.
        """
        if self._reveal is not None:
            return self._reveal
        own = self._after(Step.CONFIRM)
        self._check_confirmations(confirmations)
        self._reveal = self._open_inbox(own)
        self._share_pair = None
        self._step = Step.REVEAL
        return self._reveal

    def _check_confirmations(self, confirmations: Iterable[Confirmation]) -> None:
        given = _by_name(confirmations, "the confirmation", lambda one: one.device_id)
        strangers = sorted(given.keys() - (self._inbox.keys() & set(self._survivors)))
        if strangers:
            raise MessageError(f"{strangers} confirmed, but are no surviving neighbours")
        forged = []
        for name, confirmation in given.items():
            try:
                signing.check_confirmation(
                    self._plan, self._verifier, self._peers[name], self._survivors, confirmation
                )
            except SignatureError:
                forged.append(name)
        num_valid = len(given) - len(forged)
        if forged and num_valid < self._plan.threshold:
            raise SignatureError(
                f"{num_valid} neighbours signed the survivors that this device signed, "
                f"{self._plan.threshold} are needed; {sorted(forged)} did not",
                forged,
            )
        self._check_quorum(num_valid, "confirmed the survivors")

    def _open_inbox(self, own: Advert) -> Reveal:
        """Pick one of each neighbour's two shares; leave out what cannot be decrypted.

        One neighbour's bad ciphertext must not silence this device for all the others.
        """
        assert self._share_pair is not None
        seeds, keys = {}, {}
        for name, message in self._inbox.items():
            try:
                shares = agreement.open_shares(
                    self._plan, self._share_pair, own, self._peers[name], message
                )
            except ShareError:
                continue
            if name in self._survivors:
                seeds[name] = shares.self_seed
            else:
                keys[name] = shares.mask_key
        return Reveal(device_id=own.device_id, self_seed_shares=seeds, mask_key_shares=keys)

    # -- rules of all steps -------------------------------------------------------------------

    def _after(self, step: Step) -> Advert:
        """Insist that a step was the last one taken; give this device's own advert."""
        if self._step is not step or self._advert is None:
            last = self._step.name.lower()
            raise StateError(f"this step follows {step.name.lower()}; the last one was {last}")
        return self._advert

    def _check_quorum(self, num_neighbours: int, what: str) -> None:
        if num_neighbours < self._plan.threshold:
            raise QuorumError(
                f"{num_neighbours} neighbours {what}, {self._plan.threshold} are needed"
            )


def _by_name(
    messages: Iterable[_Message], what: str, name_of: Callable[[_Message], str]
) -> dict[str, _Message]:
    """Index messages by the device that they come from; none may come twice."""
    indexed: dict[str, _Message] = {}
    for message in messages:
        name = name_of(message)
        if name in indexed:
            raise MessageError(f"{what} of {name} came twice", [name])
        indexed[name] = message
    return indexed


def _same(is_same: bool, what: str) -> None:
    if not is_same:
        raise EquivocationError(f"the coordinator asked again, with {what}")
