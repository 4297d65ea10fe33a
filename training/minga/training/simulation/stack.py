"""Many devices' training as one batched computation.

For small networks nearly all time goes into calling operations, not into their arithmetic. So the
parameters of many devices are stacked along a new first axis, and one call serves all of them:
`torch.func.vmap` over a functional call of the network, or batched products of matrices where it
has dense layers alone (see `dense`).

Everything else is as in `minga.training.loop`: the same batches in the same order, the Task's own
loss and optimiser, FedProx and SCAFFOLD, and gradients clipped, each device's by itself. An
optimiser is used on the stack as it is, which is right for those that treat each coordinate alone.

Which devices train together in which steps: see `chunks`. Batches of unequal size are padded with
examples of no weight, where the loss of a batch is the mean of its examples' losses; else each size
goes by itself.

Plain gradient descent of dense networks builds no gradients, and weights only now and then: see
`outer`.
"""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import prod
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minga.federation.flower.arrays import without_names
from minga.federation.parameters import Layout
from minga.federation.trainer import proximal_mu
from minga.training.errors import TaskError
from minga.training.loop import BATCH_SIZE, MAX_GRAD_NORM
from minga.training.network import one_thread, parameters_of
from minga.training.proximal import Pull
from minga.training.scaffold import Correction
from minga.training.simulation.chunks import Chunk, Step, alike, chunk_of, in_order, plan_of
from minga.training.simulation.lesson import Learnt, Lesson, Matrix, Way
from minga.training.simulation.losses import PROBED_EXAMPLES, Batches, StackedLoss
from minga.training.simulation.outer import Descent, Scratch, rate_of, room_for
from minga.training.simulation.partition import Places, Population
from minga.training.space import Params
from minga.training.task import Batch, Task

CHUNK_BYTES: Final = 2 << 20
"""Parameters of one chunk on a CPU: a stack that leaves the cache is slower."""

CHUNK_BYTES_GPU: Final = 1 << 30
"""Parameters of one chunk on a GPU; gradients, optimiser and activations take several times it."""

Stacks = dict[str, Tensor]
"""The network's tensors by name; stacks have a first axis for the devices."""

COORDINATEWISE: Final = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)
"""Optimisers whose step of one coordinate depends on that coordinate alone."""


ONE_BY_ONE: Final[Params] = {"schedule": "constant", "warmup": 0.0, "class_weights": "none"}
"""Parameters of the training loop that stacks do not know, with the values that change nothing."""


class Stack:
    """Trains the devices of a round together.

    Args:
        task: what they learn.
        network: as the Task builds it; its values do not matter.
        population: the devices' examples.
    """

    def __init__(self, task: Task, network: nn.Module, population: Population) -> None:
        self._task = task
        self._population = population
        layout = Layout.of(parameters_of(network))
        ends = np.cumsum([0, *map(prod, layout.shapes)])
        self._num_values = layout.num_values
        self._shapes = dict(zip(layout.names, layout.shapes, strict=True))
        self._columns = {
            name: slice(low, high)
            for name, (low, high) in zip(layout.names, pairwise(ends), strict=True)
        }
        self._twins = _twins(network)
        self._trained = {
            name for name, parameter in network.named_parameters() if parameter.requires_grad
        }
        self._at = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = network.to(self._at).train()
        self._skeleton = copy.deepcopy(self._network)
        self._scratch = Scratch()
        self._known_rate: tuple[Params, float | None] | None = None
        self._inputs = torch.from_numpy(population.train.inputs).to(self._at)
        self._targets = torch.from_numpy(population.train.targets).to(self._at)
        some = np.linspace(0, len(population.train) - 1, PROBED_EXAMPLES).astype(np.int64)
        self._loss = StackedLoss(task, self._network, self._read(some))

    def fit(self, devices: Sequence[int], lesson: Lesson) -> Learnt:
        """Train devices: the same as `OneByOne.fit`, up to rounding.

        Raises:
            TaskError: the Task's optimiser does not treat coordinates alone, or the training loop
                is told what stacks do not know.
            RuntimeError: the network does what cannot be stacked.
        """
        params = {**self._task.defaults, **lesson.config}
        for name, usual in ONE_BY_ONE.items():
            if params.get(name, usual) != usual:
                raise TaskError(f"{name} is {params[name]!r}, which takes training one by one")
        deltas = np.empty((len(devices), self._num_values), np.float32)
        gradients = None if lesson.corrections is None else np.zeros_like(deltas)
        rate = self._plain_rate(params, lesson)
        examples = [self._population.train_of[device] for device in devices]
        batch_size = int(params.get("batch_size", BATCH_SIZE))
        epochs, seed = int(lesson.config.get("epochs", 1)), int(lesson.config.get("seed", 0))
        plans = [plan_of(len(own), batch_size, epochs, seed) for own in examples]
        rows = in_order(plans)
        with one_thread():
            # Descent computes nothing at all for devices that are done, so none are parted.
            for together in alike(rows, plans) if rate is None else [rows]:
                for low in range(0, len(together), self._num_together):
                    part = together[low : low + self._num_together]
                    chunk = chunk_of(part, examples, plans)
                    if rate is not None:
                        self._descend(chunk, lesson, rate, deltas)
                    else:
                        self._fit_chunk(chunk, lesson.of(chunk.rows), deltas, gradients)
            diverged = np.flatnonzero(~np.isfinite(torch.from_numpy(deltas).sum(1).numpy()))
        reason = "the loss is no longer a finite number"
        failures = {int(row): reason for row in diverged}
        way = Way.FUNCTIONAL if self._loss.dense is None else Way.DENSE
        return Learnt(
            deltas=deltas,
            gradients=gradients,
            way=way if rate is None else Way.DESCENT,
            failures=failures,
        )

    @property
    def _num_together(self) -> int:
        """How many devices a chunk has at most."""
        chunk_bytes = CHUNK_BYTES_GPU if self._at.type == "cuda" else CHUNK_BYTES
        return max(1, chunk_bytes // (4 * self._num_values))

    def _plain_rate(self, params: Params, lesson: Lesson) -> float | None:
        """Give the learning rate, if `Descent` can take the devices' steps.

        It can from a common start, if nothing but the loss decides where steps lead.
        """
        if self._loss.dense is None or self._twins:
            return None
        if lesson.own is not None or lesson.corrections is not None or proximal_mu(lesson.config):
            return None
        if self._known_rate is None or self._known_rate[0] != params:
            self._known_rate = params, self._rate_of(params)
        return self._known_rate[1]

    def _rate_of(self, params: Params) -> float | None:
        """Give the learning rate, if the Task's optimiser descends with it and nothing else."""
        optimiser = self._task.optimiser(self._network, without_names(params))
        moved = [one for group in optimiser.param_groups for one in group["params"]]
        is_all = {*map(id, moved)} == {id(one) for one in self._network.parameters()}
        return rate_of(optimiser) if is_all and all(one.requires_grad for one in moved) else None

    def _descend(self, chunk: Chunk, lesson: Lesson, rate: float, deltas: Matrix) -> None:
        """Take all steps of one chunk by plain descent, and write the devices' changes."""
        params = {**self._task.defaults, **lesson.config}
        max_norm = float(params.get("max_grad_norm", MAX_GRAD_NORM))
        start = torch.from_numpy(lesson.start).to(self._at)
        values = {
            name: start[columns].view(self._shapes[name]) for name, columns in self._columns.items()
        }
        assert self._loss.dense is not None
        longest = max(max(step.sizes) for step in chunk.steps)
        room = min(chunk.places.shape[1], max(longest, room_for(self._loss.dense)))
        descent = Descent(
            self._scratch,
            self._loss.dense,
            values,
            rate=rate,
            num_devices=len(chunk.rows),
            room=room,
        )
        for step in chunk.steps:
            batches = self._batches(chunk, step)
            descent.step(batches.inputs, partial(self._loss.gradient_at, batches=batches), max_norm)
        where = _span(chunk.rows)
        for name in self._shapes.keys() - self._trained:
            deltas[where, self._columns[name]] = 0.0
        for name, change in descent.changes():
            deltas[where, self._columns[name]] = change.reshape(len(change), -1).cpu().numpy()

    def _fit_chunk(
        self,
        chunk: Chunk,
        lesson: Lesson,
        deltas: Matrix,
        gradients: Matrix | None,
    ) -> None:
        """Take all steps of one chunk, and write what came of it into the devices' rows."""
        params = {**self._task.defaults, **without_names(lesson.config)}
        max_norm = float(params.get("max_grad_norm", MAX_GRAD_NORM))
        rows, counts = chunk.rows, [step.num_devices for step in chunk.steps]
        learning, fixed, shared = self._start(lesson, len(rows))
        optimiser = self._optimiser(params, learning)
        corrected, pull, mu = None, None, proximal_mu(lesson.config)
        if lesson.corrections is not None:
            corrected = Correction(self._skeleton, self._cut(lesson.corrections))
        if mu > 0:
            pull = Pull(self._skeleton, mu)
        for step, count, left in zip(chunk.steps, counts, [*counts[1:], 0], strict=True):
            optimiser.zero_grad()
            stacks: Stacks = {**learning, **fixed}
            if count < len(rows):
                stacks = {name: stack[:count] for name, stack in stacks.items()}
            self._loss.backward(stacks, shared, self._batches(chunk, step))
            if corrected is not None:
                corrected()
            if pull is not None:
                pull()
            _clip_rows(
                [stack.grad for stack in learning.values() if stack.grad is not None], max_norm
            )
            optimiser.step()
            if left == count:
                continue
            # These are done; what the optimiser makes of them further on is not looked at.
            done = slice(left, count)
            self._write_changes(rows, done, learning, lesson, deltas)
            if corrected is not None and gradients is not None:
                for name, mean in corrected.mean_gradient().items():
                    found = mean[done].reshape(count - left, -1)
                    gradients[_span(rows[done]), self._columns[name]] = found

    def _start(self, lesson: Lesson, count: int) -> tuple[Stacks, Stacks, Stacks]:
        """Give the stacks that learn, those that do not, and what is the same for all devices."""
        learning, fixed, shared = Stacks(), Stacks(), Stacks()
        start = torch.from_numpy(lesson.start)
        for name, columns in self._columns.items():
            if name in self._twins:
                continue
            shape = self._shapes[name]
            value = start[columns].reshape(shape).to(self._at)
            is_own = lesson.is_own is not None and bool(lesson.is_own[columns].any())
            if name not in self._trained and not is_own:
                shared[name] = value
                continue
            stack = self._stacked(value, count)
            if is_own:
                assert lesson.own is not None
                stack.copy_(torch.from_numpy(lesson.own_part(columns)).reshape(count, *shape))
            if name in self._trained:
                learning[name] = self._put(name, stack)
            else:
                fixed[name] = stack
        return learning, fixed, shared

    def _stacked(self, value: Tensor, count: int) -> Tensor:
        """Copy one tensor for many devices.

        Dense weights lie as their products' gradients come, the inputs' axis before the outputs':
        laid out otherwise each gradient is copied, which takes longer than to compute it.
        """
        if self._loss.dense and value.dim() == 2:
            return value.t().expand(count, *value.t().shape).clone().transpose(1, 2)
        return value.expand(count, *value.shape).clone()

    def _put(self, name: str, stack: Tensor) -> nn.Parameter:
        """Make a stack the skeleton's parameter, where FedProx and SCAFFOLD look for it."""
        path, _, own_name = name.rpartition(".")
        parameter = nn.Parameter(stack)
        self._skeleton.get_submodule(path).register_parameter(own_name, parameter)
        return parameter

    def _optimiser(self, params: Params, learning: Stacks) -> torch.optim.Optimizer:
        """Give the Task's optimiser, at work on stacks in the place of parameters.

        It is made for one device's network, so that a Task may look at names and shapes.
        """
        single = self._task.optimiser(self._network, params)
        kind = type(single)
        if kind not in COORDINATEWISE:
            raise TaskError(f"{kind.__name__} is not known to treat each coordinate alone")
        stack_of = {
            id(parameter): learning[name]
            for name, parameter in self._network.named_parameters()
            if name in learning
        }
        groups = [
            {**group, "params": [stack_of[id(parameter)] for parameter in group["params"]]}
            for group in single.param_groups
        ]
        return kind(groups)

    def _batches(self, chunk: Chunk, step: Step) -> Batches:
        """Read one step's batches."""
        read = self._read(chunk.places[: step.num_devices, step.columns])
        return Batches(inputs=read.inputs, targets=read.targets, sizes=step.sizes)

    def _read(self, places: Places) -> Batch:
        """Read examples: shapes `places.shape + ...`."""
        where = torch.from_numpy(places.ravel()).to(self._at)
        inputs, targets = self._inputs.index_select(0, where), self._targets.index_select(0, where)
        return Batch(
            inputs.view(*places.shape, *inputs.shape[1:]),
            targets.view(*places.shape, *targets.shape[1:]),
        )

    def _cut(self, matrix: Matrix) -> dict[str, NDArray[np.float32]]:
        """Cut rows of values into stacks by name."""
        return {
            name: matrix[:, self._columns[name]].reshape(len(matrix), *self._shapes[name])
            for name in self._trained
        }

    def _write_changes(
        self, rows: Places, done: slice, learning: Stacks, lesson: Lesson, deltas: Matrix
    ) -> None:
        """Write what came of some of a chunk's devices into their rows."""
        where, count = _span(rows[done]), done.stop - done.start
        for name, columns in self._columns.items():
            stack = learning.get(self._twins.get(name, name))
            if stack is None:
                deltas[where, columns] = 0.0
                continue
            values, start = stack.detach()[done].cpu().numpy(), lesson.starts(columns)
            values = values.reshape(count, -1)
            start = start if len(start) == 1 else start[done]
            if isinstance(where, slice):
                np.subtract(values, start, out=deltas[where, columns])
            else:
                deltas[where, columns] = values - start


def _twins(network: nn.Module) -> dict[str, str]:
    """Give the names under which a parameter is in a network again -> its first name."""
    first = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in network.named_parameters(remove_duplicate=False)
        if first[id(parameter)] != name
    }


def _span(rows: Places) -> slice | Places:
    """Give rows as a slice where they are one: that is much faster."""
    low, high = int(rows[0]), int(rows[-1]) + 1
    is_span = high - low == len(rows) and bool((np.diff(rows) == 1).all())
    return slice(low, high) if is_span else rows


def _clip_rows(gradients: Sequence[Tensor], max_norm: float) -> None:
    """Scale each device's gradient down to a norm, as `nn.utils.clip_grad_norm_` does for one."""
    norms = [torch.linalg.vector_norm(gradient.flatten(1), dim=1) for gradient in gradients]
    factors = max_norm / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)
    if bool((factors < 1).any()):
        factors.clamp_(max=1.0)
        for gradient in gradients:
            gradient.mul_(factors.view(-1, *[1] * (gradient.dim() - 1)))
