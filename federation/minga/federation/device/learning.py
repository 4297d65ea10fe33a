"""What a device makes of a model: an update, or metrics.

Beside the model that travels a device may have tensors of its own (see `parts`): they are put in
before training and measuring, and taken out of what leaves the device.

With control variates training follows SCAFFOLD (Karimireddy et al., ICML 2020, algorithm 1): each
step's gradient is corrected by `c - c_i`, the global variate and the device's own, and the device
sends what changed in the model and in its variate. The variate becomes the mean of the uncorrected
gradients along the way. For plain gradient descent that is the algorithm's option II,
`c_i - c + (x - y_i) / (K * lr)`: there `x - y_i` is `lr` times the sum of K corrected gradients.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from minga.federation.device.keepsakes import Keepsakes
from minga.federation.device.metrics import Metrics
from minga.federation.device.trainer_process import TrainedUpdate, TrainerProcess
from minga.federation.errors import PeerError, TrainerError
from minga.federation.parameters import Layout, Parameters, read_parameters
from minga.federation.parts import (
    has_control,
    is_personal,
    split_control,
    split_personal,
    with_control,
)
from minga.federation.trainer import NUM_EXAMPLES, Scalar, Update
from minga.federation.work import Evaluation, Method

Trained = TypeVar("Trained", bound=TrainedUpdate | Update)


class LocalLearning:
    """One device's learning in one round.

    Args:
        trainer: has the data.
        keepsakes: has this device's own tensors; None for a device that keeps none.
        method: how devices learn in this campaign.
        config: what the trainer is told.
        round_id: under which changes of own tensors are kept.
        campaign_id: whose control variate it is.
        model_name: whose personal tensors they are.
        clip: bounds each coordinate of a variate's change, as masking does; None: nothing does.
        metrics: what Prometheus reads.
    """

    def __init__(
        self,
        *,
        trainer: TrainerProcess,
        keepsakes: Keepsakes | None,
        method: Method,
        config: Mapping[str, Scalar],
        round_id: str,
        campaign_id: str,
        model_name: str,
        clip: float | None,
        metrics: Metrics,
    ) -> None:
        if method.keeps_state and keepsakes is None:
            raise PeerError("this device keeps no tensors of its own")
        self._trainer = trainer
        self._kept = keepsakes
        self._method = method
        self._config = config
        self._round_id = round_id
        self._campaign_id = campaign_id
        self._model_name = model_name
        self._clip = clip
        self._metrics = metrics

    async def train(self, travelling: Path, layout: Layout) -> tuple[NDArray[np.float32], int]:
        """Train on what travelled, a safetensors file of some layout.

        Returns:
            What is to be sent, in the order of the layout, and the example count.

        Raises:
            TrainerError: user code failed, or its update is none.
            PeerError: what travelled is not what the method needs.
        """
        if has_control(layout.names) != self._method.scaffold:
            raise PeerError("control variates travel with the model if, and only if, they are used")
        if self._method.keeps_state:
            changed, num_examples = await self._train_with_own(travelling)
            return layout.flatten(changed), num_examples
        update = await self._timed(self._trainer.fit(travelling, self._config))
        _require_update(update.layout, update.num_examples, layout)
        return update.vector, update.num_examples

    async def _train_with_own(self, travelling: Path) -> tuple[Parameters, int]:
        """Train with tensors of this device's own, and keep what becomes of them."""
        model, control = split_control(await asyncio.to_thread(read_parameters, travelling))
        personal = await self._personal_of(model)
        own = self._own_control(model)
        update = await self._timed(self._fit({**model, **personal}, control, own))
        changed = {name: update.delta[name] for name in model}
        if isinstance(update, Update):
            drift = self._control_change(update, own)
            changed = with_control(changed, drift)
            own = {name: own[name] + drift[name] for name in own}
        if self._kept is not None:
            moved = {name: value + update.delta[name] for name, value in personal.items()}
            self._kept.stage(
                self._round_id,
                model_name=self._model_name,
                personal=moved,
                campaign_id=self._campaign_id,
                control=own,
            )
        return changed, update.num_examples

    async def evaluate(
        self, asked: Evaluation, travelling: Path
    ) -> tuple[NDArray[np.float32], int]:
        """Measure what travelled, a safetensors file.

        Returns:
            The metrics' vector, and how many examples it is over.

        Raises:
            TrainerError, PeerError: as for `train`.
        """
        full: Parameters | Path = travelling
        if self._method.keeps_state:
            model, _ = split_control(await asyncio.to_thread(read_parameters, travelling))
            full = {**model, **await self._personal_of(model)}
        metrics = await self._trainer.evaluate(full, self._config)
        weight = metrics.get(NUM_EXAMPLES)
        if weight is None:
            weight = await self._trainer.num_examples()
        return asked.vector_of(metrics), max(1, int(weight or 1))

    async def _timed(self, training: Awaitable[Trained]) -> Trained:
        start = time.perf_counter()
        update = await training
        self._metrics.training.observe(time.perf_counter() - start)
        return update

    async def _personal_of(self, model: Parameters) -> Parameters:
        """Give this device's personal tensors; new ones where none of the right shape are kept.

        Raises:
            PeerError: personal tensors came with the model.
        """
        patterns = self._method.personal
        if not patterns:
            return {}
        assert self._kept is not None
        if any(is_personal(name, patterns) for name in model):
            raise PeerError("the model brings tensors that are this device's own")
        _, fresh = split_personal(await self._trainer.initial(self._config), patterns)
        kept = self._kept.personal(self._model_name)
        return {
            name: kept[name] if name in kept and kept[name].shape == value.shape else value
            for name, value in fresh.items()
        }

    def _own_control(self, model: Parameters) -> Parameters:
        """Give this device's control variate, zero before its first round."""
        if not self._method.scaffold:
            return {}
        assert self._kept is not None
        own = self._kept.control(self._campaign_id)
        if own and Layout.of(own) != Layout.of(model):
            raise PeerError("the campaign's model changed its tensors")
        return own or {name: np.zeros_like(value) for name, value in model.items()}

    async def _fit(
        self, full: Parameters, control: Parameters, own: Parameters
    ) -> TrainedUpdate | Update:
        """Train from the whole model: corrected, and an `Update`, if the method is SCAFFOLD."""
        update: TrainedUpdate | Update
        if self._method.scaffold:
            if Layout.of(control) != Layout.of(own):
                raise PeerError("the control variate is not of this model")
            correction = {name: control[name] - own[name] for name in own}
            update = await self._trainer.fit_corrected(full, self._config, correction)
        else:
            update = await self._trainer.fit(full, self._config)
        _require_update(Layout.of(update.delta), update.num_examples, Layout.of(full))
        return update

    def _control_change(self, update: Update, own: Parameters) -> Parameters:
        """Say how this device's variate changes, as far as the sum will have it."""
        gradient = update.gradient or {}
        change = {
            name: control_change(gradient.get(name, np.zeros_like(value)), value, self._clip)
            for name, value in own.items()
        }
        if Layout.of(change) != Layout.of(own):
            raise TrainerError("the mean gradient has other shapes than the model")
        return change


def control_change(
    gradient: NDArray[np.float32], own: NDArray[np.float32], clip: float | None
) -> NDArray[np.float32]:
    """Say how a device's control variate changes, of any shape.

    Args:
        gradient: the mean of the uncorrected gradients along the way.
        own: the variate so far.
        clip: bounds each coordinate of the change, as masking does; None: nothing does.
    """
    change = np.asarray(gradient - own, np.float32)
    return change if clip is None else np.clip(change, -clip, clip)


def _require_update(layout: Layout, num_examples: int, wanted: Layout) -> None:
    if layout != wanted:
        raise TrainerError("the update has other tensors than the model")
    if num_examples < 1:
        raise TrainerError("the device has no examples to learn from")
