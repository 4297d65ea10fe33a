"""The virtual devices: what they keep, how fast they are, and what they answer in a round."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minga.federation.aggregation.privacy import clip_length
from minga.federation.coordinator.rounds import RoundOrder
from minga.federation.device.learning import control_change
from minga.federation.device.participant import control_clip
from minga.federation.plain import PlainPlan
from minga.federation.secagg.fixedpoint import encode_update
from minga.federation.secagg.plan import RoundPlan
from minga.federation.trainer import NUM_EXAMPLES
from minga.federation.work import Evaluation
from minga.training.federated import TaskTrainer
from minga.training.simulation.config import SimulationConfig
from minga.training.simulation.crew import Crew
from minga.training.simulation.lesson import Learnt, Lesson, Matrix, Vector
from minga.training.simulation.partition import Places, Population
from minga.training.simulation.parts import Parts
from minga.training.task import Task

LOST = "vanished while it trained"
"""Why a device is out that dropped out."""

TOO_FEW = "the campaign asks for more examples"

FAILED = "training failed on the device"
"""What a real device says then; its own log says more."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upload:
    """What a device sends: a vector, or its levels in a secure round, and how much it counts."""

    values: NDArray[Any]
    weight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """How a device answers an invitation, so many seconds after it."""

    device_id: str
    after_s: float
    upload: Upload | None
    """None if it leaves."""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepings:
    """What devices keep from round to round, as `device.keepsakes` does on real ones.

    Attributes:
        controls: each device's control variate, once it has one (SCAFFOLD).
        personal: each device's own values, once it has trained them.
        staged: what takes effect if the round counts the device's update.
    """

    controls: dict[str, Vector] = field(default_factory=dict)
    personal: dict[str, Vector] = field(default_factory=dict)
    staged: dict[str, tuple[Vector | None, Vector | None]] = field(default_factory=dict)

    def copy(self) -> "Keepings":
        """Copy it; the vectors themselves are never changed."""
        return Keepings(
            controls=dict(self.controls),
            personal=dict(self.personal),
            staged=dict(self.staged),
        )


@dataclass(slots=True, kw_only=True)
class Fleet:
    """All devices of a simulation."""

    task: Task
    population: Population
    config: SimulationConfig
    parts: Parts
    crew: Crew
    speeds: Vector
    number_of: dict[str, int]
    kept: Keepings = field(default_factory=Keepings)

    @classmethod
    def of(
        cls,
        task: Task,
        population: Population,
        config: SimulationConfig,
        *,
        parts: Parts,
        crew: Crew,
        seed: int,
    ) -> "Fleet":
        """Make the devices; their speeds are drawn."""
        rng = np.random.default_rng([seed, 3])
        speeds = np.exp(config.speed_spread * rng.standard_normal(len(population)))
        return cls(
            task=task,
            population=population,
            config=config,
            parts=parts,
            crew=crew,
            speeds=speeds.astype(np.float32),
            number_of={name: number for number, name in enumerate(population.names)},
        )

    # --- training ---

    def train(
        self,
        names: Sequence[str],
        order: RoundOrder,
        travelling: Vector,
        rng: np.random.Generator,
    ) -> list[Reply]:
        """Let invited devices train from what travels, and say when each would answer what."""
        sizes = np.array([len(self._examples(name)) for name in names])
        epochs = int(order.training.get("epochs", 1))
        seconds = self.config.seconds_per_example * sizes * epochs
        seconds /= self.speeds[[self.number_of[name] for name in names]]
        vanished = rng.random(len(names)) < self.config.dropout
        moments = rng.random(len(names))
        replies: list[Reply] = []
        going: list[int] = []
        for row, name in enumerate(names):
            if sizes[row] < order.min_examples:
                replies.append(Reply(device_id=name, after_s=0.0, upload=None, reason=TOO_FEW))
            elif vanished[row]:
                after_s = float(seconds[row] * moments[row])
                replies.append(Reply(device_id=name, after_s=after_s, upload=None, reason=LOST))
            else:
                going.append(row)
        if going:
            uploads = self._uploads([names[row] for row in going], order, travelling, rng)
            for row, upload in zip(going, uploads, strict=True):
                reason = FAILED if upload is None else ""
                replies.append(
                    Reply(
                        device_id=names[row],
                        after_s=float(seconds[row]),
                        upload=upload,
                        reason=reason,
                    )
                )
        return replies

    def _uploads(
        self,
        names: Sequence[str],
        order: RoundOrder,
        travelling: Vector,
        rng: np.random.Generator,
    ) -> list[Upload | None]:
        lesson = self.lesson(names, order, travelling)
        learnt = self.crew.fit([self.number_of[name] for name in names], lesson)
        rows = self._sent(names, order, lesson, learnt)
        return [
            None
            if row in learnt.failures
            else protect(order, rows[row], len(self._examples(name)), rng)
            for row, name in enumerate(names)
        ]

    def lesson(self, names: Sequence[str], order: RoundOrder, travelling: Vector) -> Lesson:
        """Put together what devices start from and are told."""
        parts = self.parts
        if not parts.has_personal and not parts.scaffold:
            return Lesson(start=travelling, config=order.training)
        start = np.zeros(parts.network.num_values, np.float32)
        start[parts.is_shared] = parts.shared(travelling)
        own = np.stack([self._personal_of(name, order) for name in names])
        corrections: Matrix | None = None
        if parts.scaffold:
            corrections = np.zeros((len(names), start.size), np.float32)
            control = parts.control(travelling)
            for row, name in enumerate(names):
                corrections[row, parts.is_shared] = control - self._control_of(name)
        return Lesson(
            start=start,
            config=order.training,
            own=own if parts.has_personal else None,
            is_own=~parts.is_shared if parts.has_personal else None,
            corrections=corrections,
        )

    def _sent(
        self, names: Sequence[str], order: RoundOrder, lesson: Lesson, learnt: Learnt
    ) -> Matrix:
        """Give what devices send of what they learnt, and stage what they keep of it."""
        parts = self.parts
        if not parts.has_personal and not parts.scaffold:
            return learnt.deltas
        changed = learnt.deltas[:, parts.is_shared]
        if parts.scaffold:
            assert learnt.gradients is not None
            own = np.stack([self._control_of(name) for name in names])
            drift = control_change(
                learnt.gradients[:, parts.is_shared], own, control_clip(order.plan)
            )
            changed, own = np.concatenate([drift, changed], axis=1), own + drift
        for row, name in enumerate(names):
            moved: Vector | None = None
            if lesson.own is not None:
                moved = lesson.own[row] + learnt.deltas[row, ~parts.is_shared]
            self.kept.staged[name] = (own[row] if parts.scaffold else None, moved)
        return changed

    def settle(self, names: Sequence[str], counted: Sequence[str]) -> None:
        """Let devices keep what a round made of them that counted their updates."""
        for name in names:
            control, personal = self.kept.staged.pop(name, (None, None))
            if name in counted:
                if control is not None:
                    self.kept.controls[name] = control
                if personal is not None:
                    self.kept.personal[name] = personal

    def _examples(self, name: str) -> Places:
        return self.population.train_of[self.number_of[name]]

    def _control_of(self, name: str) -> Vector:
        kept = self.kept.controls.get(name)
        return np.zeros(self.parts.num_shared, np.float32) if kept is None else kept

    def _personal_of(self, name: str, order: RoundOrder) -> Vector:
        """Give a device's own values; new ones, prepared for its own data, before its first."""
        if not self.parts.has_personal:
            return np.zeros(0, np.float32)
        kept = self.kept.personal.get(name)
        if kept is not None:
            return kept
        splits = self.population.splits_of(self.number_of[name])
        fresh = TaskTrainer(self.task, splits).initial(order.training)
        return self.parts.network.flatten(fresh)[~self.parts.is_shared]

    # --- measuring ---

    def measure(
        self,
        names: Sequence[str],
        order: RoundOrder,
        travelling: Vector,
        rng: np.random.Generator,
    ) -> list[Reply]:
        """Let invited devices measure what travels on their own validation examples."""
        asked = order.work
        assert isinstance(asked, Evaluation)
        has_some = [len(self.population.validation_of[self.number_of[name]]) > 0 for name in names]
        able = [name for name, has in zip(names, has_some, strict=True) if has]
        lesson = self.lesson(able, order, travelling) if able else None
        measured = (
            self.crew.evaluate([self.number_of[name] for name in able], lesson) if lesson else []
        )
        found = dict(zip(able, measured, strict=True))
        replies: list[Reply] = []
        for name in names:
            if name not in found:
                reason = "it has no examples to measure on"
                replies.append(Reply(device_id=name, after_s=0.0, upload=None, reason=reason))
                continue
            weight = max(1, int(found[name][NUM_EXAMPLES]))
            upload = protect(order, asked.vector_of(found[name]), weight, rng)
            replies.append(Reply(device_id=name, after_s=0.0, upload=upload))
        return replies


def protect(
    order: RoundOrder, values: Vector, num_examples: int, rng: np.random.Generator
) -> Upload:
    """Give a vector as it leaves a device, by the code of real ones.

    In a secure round that is its levels without masks, which cancel in the sum.
    """
    weight = min(num_examples, order.plan.max_weight)
    match order.plan:
        case PlainPlan():
            if order.encoding is not None:
                values, _ = clip_length(values, order.encoding.max_norm)
            return Upload(values=values, weight=weight)
        case RoundPlan() as plan:
            encode = encode_update if order.encoding is None else order.encoding.encode
            return Upload(values=encode(plan, values, weight, rng.bytes), weight=weight)
