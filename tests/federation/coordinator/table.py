"""A secure round and its devices around one table, without sockets or clocks, for tests."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from minga.federation.coordinator.authority import Authority
from minga.federation.coordinator.rounds import (
    ConfirmSurvivors,
    DeadlinePassed,
    Event,
    KeysAdvertised,
    RevealShares,
    RoundOrder,
    SecureRound,
    SendUpdate,
    ShareSecrets,
    SharesRevealed,
    SharesSent,
    Stage,
    SurvivorsConfirmed,
    TakePart,
    Timeouts,
    UpdateUploaded,
    open_round,
)
from minga.federation.identity import CertificateVerifier, Identity, Role, make_csr, new_key
from minga.federation.secagg.coordinator import MaskedSum, unmask
from minga.federation.secagg.device import DeviceSession
from minga.federation.secagg.plan import context_digest, derive_plan

NUM_VALUES = 50
MODEL = bytes(32)


def make_identities(folder: Path, count: int) -> dict[str, Identity]:
    """Make some devices of one authority."""
    authority = Authority.open(folder)
    devices = {}
    for name in (f"site-{index}" for index in range(count)):
        key = new_key()
        certificate = authority.issue_client(Role.DEVICE, name, make_csr(key, name))
        devices[name] = Identity.of(key, certificate, authority.certificate)
    return devices


class Table:
    """A round and its devices around one table; `silent` devices never answer again."""

    def __init__(
        self,
        identities: dict[str, Identity],
        min_cohort: int = 3,
        *,
        goal: int | None = None,
        num_groups: int = 1,
    ) -> None:
        plan = derive_plan(
            round_id=bytes(range(16)),
            context_digest=context_digest(MODEL, {}),
            num_values=NUM_VALUES,
            cohort_size=len(identities) // num_groups,
            clip=1.0,
            value_bits=16,
            max_weight=10,
            expected_dropout=0.34 if num_groups == 1 else 0.25,
            colluder_share=0.0,
        )
        self.order = RoundOrder(
            round_id=plan.round_id.hex(),
            number=1,
            plan=plan,
            invited=tuple(identities),
            min_cohort=min_cohort,
            goal=goal or len(identities),
            num_groups=num_groups,
            model_digest=MODEL,
            training={},
            timeouts=Timeouts(keys_s=10, stage_s=10, updates_s=100),
        )
        round_ = open_round(self.order, 0.0)
        assert isinstance(round_, SecureRound)
        self.round = round_
        self.sessions = {
            name: DeviceSession(plan, identity, CertificateVerifier(authority=identity.authority))
            for name, identity in identities.items()
        }
        self.silent: set[str] = set()
        self.uploads: dict[str, bytes] = {}
        self.log: list[Event] = []
        self.now = 0.0

    def take(self, event: Event) -> bool:
        self.now += 1.0
        self.log.append(event)
        return self.round.apply(event, self.now)

    def answer(self, name: str) -> Event | None:
        """Let one device do what it is told."""
        session = self.sessions[name]
        match self.round.instruction(name):
            case TakePart():
                return KeysAdvertised(device_id=name, advert=session.advertise())
            case ShareSecrets(adverts=adverts):
                return SharesSent(device_id=name, shares=session.share(adverts))
            case SendUpdate(shares=shares):
                self.uploads[name] = session.mask(shares, delta_of(name), weight_of(name))
                return UpdateUploaded(
                    device_id=name, digest=name.encode(), size=len(self.uploads[name])
                )
            case ConfirmSurvivors(survivors=survivors):
                return SurvivorsConfirmed(device_id=name, confirmation=session.confirm(survivors))
            case RevealShares(confirmations=confirmations):
                return SharesRevealed(device_id=name, reveal=session.reveal(confirmations))
            case _:
                return None

    def play(self, until: Stage, lose: Callable[[Stage], Iterable[str]] = lambda stage: ()) -> None:
        """Let all devices answer, stage by stage; some fall silent at the start of a stage."""
        while self.round.stage is not until and not self.round.stage.ended:
            stage = self.round.stage
            self.silent.update(lose(stage))
            for name in self.order.invited:
                if name not in self.silent and (event := self.answer(name)) is not None:
                    self.take(event)
            if self.round.stage is stage:
                self.take(DeadlinePassed(stage=stage))

    def sum(self, group: Iterable[str] | None = None) -> tuple[np.ndarray, int]:
        """Unmask what a group uploaded, or all if there is one."""
        members = set(group or self.order.invited)
        survivors = [name for name in self.round.survivors if name in members]
        masked = MaskedSum(self.round.plan)
        for name in survivors:
            masked.add(self.uploads[name])
        result = unmask(
            plan=self.round.plan,
            graph=self.round.graph,
            adverts=self.round.adverts,
            sharers=[name for name in self.round.sharers if name in members],
            survivors=survivors,
            reveals=self.round.reveals,
            masked_sum=masked,
        )
        return result.mean_delta, result.total_weight


def weight_of(name: str) -> int:
    return 10 if name.endswith(("0", "2", "4")) else 5


def delta_of(name: str) -> np.ndarray:
    """An update that fixed point holds exactly also after weighting by a half."""
    level = 2 * (int(name[-1]) - 2) * 1000
    return np.full(NUM_VALUES, level / (2**15 - 1), np.float32)


def expected_mean(names: Iterable[str]) -> float:
    weights = {name: weight_of(name) for name in names}
    total = sum(weights.values())
    return sum(float(delta_of(name)[0]) * weight for name, weight in weights.items()) / total
