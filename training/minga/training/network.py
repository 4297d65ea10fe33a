"""The network of a Task: its preparation and its model in one, and its parameters as arrays.

A network's parameters are the float32 tensors of its `state_dict`, named `preparation.*` and
`model.*`; other tensors, such as counters, stay at home.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from minga.federation.parameters import Parameters
from minga.training.architectures import plain_model
from minga.training.errors import ShapeError, TaskError
from minga.training.preparation import OnlyColumns
from minga.training.space import NETWORKS, OWN, Params, architecture_of, features_of
from minga.training.stored import StoredRows
from minga.training.task import Batch, Split, Task

_MODEL = "model."


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, so that results repeat bit by bit and workers do not fight for cores.

    Two threads beside other work were 5 to 10 times slower than one, and gave other bits.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def build_network(task: Task, params: Params, train: Split, *, seed: int) -> nn.Sequential:
    """Make an untrained network; the seed decides its first weights.

    Its model is the Task's own, unless the hyper-parameter `architecture` names a plain one.

    Raises:
        TaskError: `model` or `preparation` fails or gives no module, or the architecture is none
            of a network.
    """
    torch.manual_seed(seed)
    architecture = architecture_of(params)
    if architecture not in NETWORKS:
        raise TaskError(
            f"architecture {architecture!r} is no network, so it has no weights to federate, to "
            f"train further or to follow gradients through; networks are {', '.join(NETWORKS)}"
        )
    preparation = build_preparation(task, params, train)
    model = _made(task, "model", lambda: task.model(params))
    if architecture != OWN:
        model = plain_model(
            architecture, preparation=preparation, own=model, example=train.inputs[:1]
        )
    network = nn.Sequential(OrderedDict(preparation=preparation, model=model))
    if architecture == OWN:
        task.begin(network, train, seed=seed)
    return network


def build_preparation(task: Task, params: Params, train: Split) -> nn.Module:
    """Make the network's first part: what a model may go by, prepared.

    Raises:
        TaskError: the Task's `preparation` fails or gives no module, or the hyper-parameter
            `features` names what is no column.
    """
    preparation = _made(task, "preparation", lambda: task.preparation(train))
    features = features_of(params)
    if not features:
        return preparation
    chosen = OnlyColumns.fitted(train, task.columns, features)
    return nn.Sequential(OrderedDict(chosen=chosen, table=preparation))


def _made(task: Task, part: str, make: Callable[[], object]) -> nn.Module:
    try:
        made = make()
    except Exception as error:
        raise TaskError(
            f"{type(task).__name__}.{part} failed: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, nn.Module):
        raise TaskError(
            f"{type(task).__name__}.{part} gave a {type(made).__name__}; "
            "it must return a torch.nn.Module"
        )
    return made


def parameters_of(network: nn.Module) -> Parameters:
    """Copy the network's parameters out."""
    return {
        name: tensor.detach().cpu().numpy().copy()
        for name, tensor in network.state_dict().items()
        if tensor.dtype == torch.float32
    }


def model_names(network: nn.Module) -> dict[str, str]:
    """Give the names of the model's own parameters, in its order -> as the model calls them."""
    names = (name for name, tensor in network.state_dict().items() if tensor.dtype == torch.float32)
    return {name: name.removeprefix(_MODEL) for name in names if name.startswith(_MODEL)}


def load_parameters(network: nn.Module, parameters: Parameters) -> None:
    """Copy parameters into the network.

    Raises:
        ShapeError: names or shapes are not the network's.
    """
    own = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if tensor.dtype == torch.float32
    }
    for name in sorted(own.keys() | parameters.keys()):
        mine = tuple(own[name].shape) if name in own else None
        theirs = parameters[name].shape if name in parameters else None
        if mine != theirs:
            raise ShapeError(
                f"parameter {name} is {theirs or 'absent'}, the network's is {mine or 'absent'}; "
                "were the parameters trained with other hyper-parameters?"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.array(parameters[name], np.float32)))


class RowsOnDisk:
    """Inputs that stay on the disk, as the training loop asks for them: by rows."""

    def __init__(self, rows: StoredRows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._rows[places.numpy()])


def batch_of(split: Split) -> Batch:
    """Copy a split into tensors, of the types that it has; stored inputs stay where they are."""
    if isinstance(split.inputs, StoredRows):
        targets = torch.from_numpy(split.targets.copy())
        return Batch(RowsOnDisk(split.inputs), targets)
    return Batch(torch.from_numpy(split.inputs.copy()), torch.from_numpy(split.targets.copy()))
