"""From revealed shares to the masks that are left in the sum.

Left are the self masks of the survivors, and the pairwise masks between a survivor and a device
that dropped out after it shared its secrets. Everything rebuilt is checked against what its owner
advertised, so a false share is noticed, and left out where enough true ones exist.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations, islice
from typing import Final

from minga.federation.secagg import agreement
from minga.federation.secagg.agreement import KeyPair
from minga.federation.secagg.errors import QuorumError, ShareError
from minga.federation.secagg.masking import Mask
from minga.federation.secagg.messages import Advert, Reveal
from minga.federation.secagg.plan import RoundPlan
from minga.federation.secagg.shamir import Interpolation

MAX_TRIES: Final = 4096
"""Choices of shares tried for one secret. With e liars and threshold t at most C(t + e, t) are
needed, so this bears two liars up to t = 88 and three up to t = 26, however they lie; liars found
at one secret are the last choice for the next."""

Graph = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """What takes the masks off a sum."""

    masks: tuple[Mask, ...] = field(repr=False)
    """To be applied to the sum as they are."""
    liars: tuple[str, ...]
    """Devices whose false shares had to be left out, sorted.

    A false share that was not needed goes unnoticed. One from an honest device was false already
    when it was given to it.
    """


def can_unmask(
    plan: RoundPlan,
    graph: Graph,
    sharers: Collection[str],
    survivors: Collection[str],
    reveals: Mapping[str, Reveal],
) -> bool:
    """Tell whether the reveals hold enough shares for every secret that the sum needs."""
    needed = [_seed_shares(graph, reveals, name) for name in survivors]
    needed += [_key_shares(graph, reveals, name) for name in set(sharers) - set(survivors)]
    enough = all(len(shares) >= plan.threshold for shares in needed)
    return enough and len(survivors) > plan.threshold


def recover_masks(
    *,
    plan: RoundPlan,
    graph: Graph,
    adverts: Mapping[str, Advert],
    sharers: Collection[str],
    survivors: Collection[str],
    reveals: Mapping[str, Reveal],
) -> Recovery:
    """Rebuild the secrets that the sum needs (Bonawitz et al., figure 4, round 4).

    Args:
        plan: The round's numbers.
        graph: Device -> its neighbours.
        adverts: The adverts that were handed on.
        sharers: The devices whose shares were handed on.
        survivors: The devices whose updates are in the sum.
        reveals: What survivors revealed.

    Raises:
        QuorumError: a secret has fewer shares than the threshold.
        ShareError: a secret's shares are false, and no choice of them gives the true one.
    """
    rebuilder = _Rebuilder(plan, adverts, reveals.keys())
    masks = []
    for name in sorted(survivors):
        seed = rebuilder.self_seed(name, _seed_shares(graph, reveals, name))
        masks.append(agreement.self_mask(plan, name, seed).inverse())
    for name in sorted(set(sharers) - set(survivors)):
        secret = rebuilder.mask_key(name, _key_shares(graph, reveals, name))
        pair = KeyPair.from_secret(secret)
        # The pair's mask as the lost device would have applied it undoes the survivor's.
        masks += [
            agreement.pair_mask(plan, pair, adverts[name], adverts[peer])
            for peer in graph[name]
            if peer in survivors
        ]
    return Recovery(masks=tuple(masks), liars=tuple(sorted(rebuilder.liars)))


def _seed_shares(graph: Graph, reveals: Mapping[str, Reveal], owner: str) -> dict[str, bytes]:
    return {
        holder: reveals[holder].self_seed_shares[owner]
        for holder in graph[owner]
        if holder in reveals and owner in reveals[holder].self_seed_shares
    }


def _key_shares(graph: Graph, reveals: Mapping[str, Reveal], owner: str) -> dict[str, bytes]:
    return {
        holder: reveals[holder].mask_key_shares[owner]
        for holder in graph[owner]
        if holder in reveals and owner in reveals[holder].mask_key_shares
    }


class _Rebuilder:
    """Rebuilds secrets from shares, some of which may be false."""

    def __init__(
        self, plan: RoundPlan, adverts: Mapping[str, Advert], revealers: Collection[str]
    ) -> None:
        self.liars: set[str] = set()
        self._plan = plan
        self._adverts = adverts
        self._revealers = revealers
        self._interpolations: dict[tuple[str, ...], Interpolation] = {}

    def self_seed(self, owner: str, shares: Mapping[str, bytes]) -> bytes:
        commitment = self._adverts[owner].self_seed_commitment
        return self._rebuild(
            f"the self-mask seed of {owner}",
            owner,
            shares,
            lambda seed: agreement.commit_seed(self._plan, owner, seed) == commitment,
        )

    def mask_key(self, owner: str, shares: Mapping[str, bytes]) -> bytes:
        public = self._adverts[owner].mask_key
        return self._rebuild(
            f"the mask key of {owner}",
            owner,
            shares,
            lambda secret: KeyPair.from_secret(secret).public == public,
        )

    def _rebuild(
        self,
        what: str,
        owner: str,
        shares: Mapping[str, bytes],
        is_true: Callable[[bytes], bool],
    ) -> bytes:
        threshold = self._plan.threshold
        if len(shares) < threshold:
            raise QuorumError(
                f"{len(shares)} shares of {what} were revealed, {threshold} are needed"
            )
        holders = self._honest_first(shares)
        for number, chosen in enumerate(islice(_choices(holders, threshold), MAX_TRIES)):
            # Only the first choice is likely to come again, for another secret.
            weights = _weights(chosen) if number else self._first_weights(owner, holders)
            secret = weights.secret([shares[name] for name in chosen])
            if secret is not None and is_true(secret):
                if number:
                    self._note_liars(shares, chosen)
                return secret
        raise ShareError(
            f"the {len(shares)} shares of {what} do not rebuild what it advertised: it shared "
            "something else, or too many of its neighbours lie",
            [owner],
        )

    def _first_weights(self, owner: str, holders: list[str]) -> Interpolation:
        """Give the weights of the first `threshold` holders.

        A device holds no share of its own secrets. So over a complete graph all devices share one
        list of holders, each with itself left out, and its weights are nearly the same for all.
        """
        threshold = self._plan.threshold
        if owner in self._revealers:
            first = self._honest_first([*holders, owner])[: threshold + 1]
            if owner in first:
                return self._kept_weights(first).without(agreement.share_place(owner))
        return self._kept_weights(holders[:threshold])

    def _kept_weights(self, holders: list[str]) -> Interpolation:
        key = tuple(holders)
        if key not in self._interpolations:
            self._interpolations[key] = _weights(key)
        return self._interpolations[key]

    def _honest_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (name in self.liars, name))

    def _note_liars(self, shares: Mapping[str, bytes], honest: tuple[str, ...]) -> None:
        """Compare every other share with the polynomial that the honest ones lie on."""
        values = [shares[name] for name in honest]
        for name in shares.keys() - set(honest):
            due = _weights(honest, at=agreement.share_place(name)).value(values)
            if due != int.from_bytes(shares[name]):
                self.liars.add(name)


def _weights(holders: tuple[str, ...], at: int = 0) -> Interpolation:
    return Interpolation([agreement.share_place(name) for name in holders], at)


def _choices(holders: list[str], threshold: int) -> Iterator[tuple[str, ...]]:
    """Give every choice of `threshold` holders once, those that need few liars left out first."""
    for last in range(threshold - 1, len(holders)):
        for others in combinations(holders[:last], threshold - 1):
            yield (*others, holders[last])
