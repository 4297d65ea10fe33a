"""What competes to be a Task's model.

A contender is fitted on examples and gives a `minga.training.models.Model`: something that answers
and exports. Networks are contenders by their hyper-parameters alone; what is no network is named by
its contender. A Task adds its own with `Task.contenders`.
"""

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from minga.training.anomalies import AnomalyTask
from minga.training.clusters import CLUSTERS, ClusterTask
from minga.training.errors import TaskError
from minga.training.history import Record, best_record, is_stalled
from minga.training.loop import Learner, fit
from minga.training.models import Model, NetworkModel
from minga.training.network import build_network
from minga.training.selection.boosting import Boosting
from minga.training.selection.forest import IsolationForest
from minga.training.selection.mixture import GaussianMixture
from minga.training.space import (
    ARCHITECTURE,
    FEATURES,
    LINEAR,
    MLP,
    NETWORKS,
    OWN,
    Params,
    architecture_of,
    is_network,
)
from minga.training.task import NAME, Split, Task

if TYPE_CHECKING:
    from minga.training.config import TrainConfig


class Contender(Protocol):
    """A kind of model that a Task could have."""

    @property
    def name(self) -> str:
        """What it is called, in tables and as the hyper-parameter `architecture`."""
        ...

    def fit(self, train: Split, validation: Split, *, seed: int) -> Model:
        """Learn from one split; the other says when to stop, or where a threshold lies.

        The same arguments give the same model.
        """
        ...


class NetworkContender:
    """A network, trained as everywhere: the best epoch on the validation split is kept.

    Args:
        task: builds it.
        params: complete hyper-parameters; `architecture` among them says which model it has.
        config: epochs and patience.
    """

    def __init__(self, task: Task, params: Params, config: "TrainConfig") -> None:
        self.name = architecture_of(params)
        self._task = task
        self._params = params
        self._config = config

    def fit(self, train: Split, validation: Split, *, seed: int) -> Model:
        """Train in this process, on one thread.

        Raises:
            DivergedError: the loss is no longer a finite number.
        """
        network = build_network(self._task, self._params, train, seed=seed)
        learner = Learner(self._task, network, self._params)
        objective, config = self._task.objective, self._config
        best_weights = copy.deepcopy(network.state_dict())

        def keep(record: Record) -> bool:
            nonlocal best_weights
            if best_record(learner.history, objective) is record:
                best_weights = copy.deepcopy(network.state_dict())
            return is_stalled(
                learner.history, objective, patience=config.patience, min_gain=config.min_gain
            )

        fit(learner, train, epochs=config.epochs, seed=seed, validation=validation, on_epoch=keep)
        network.load_state_dict(best_weights)
        self._task.finish(network, validation)
        return NetworkModel(network, train.inputs)


def contenders_of(
    task: Task, config: "TrainConfig", params: Params | None = None
) -> Mapping[str, Contender]:
    """Give all that compete for a Task, by name.

    Args:
        task: the Task.
        config: of the training of networks.
        params: of the Task's own model, such as a search has found; its defaults otherwise.

    Raises:
        TaskError: two of the Task's contenders have one name, or the name of another one.
    """
    own = {**task.defaults, **(params or {})}
    # The loss of a Task without targets is what its own model answers: no plain network has that.
    kinds = (OWN,) if isinstance(task, AnomalyTask | ClusterTask) else (LINEAR, MLP, OWN)
    networks = {name: params_of(task, name, own) for name in kinds}
    found: dict[str, Contender] = {
        name: NetworkContender(task, chosen, config) for name, chosen in networks.items()
    }
    other = _no_network(task, own)
    found[other.name] = other
    for contender in task.contenders():
        if not re.fullmatch(NAME, contender.name):
            raise TaskError(
                f"{type(task).__name__}.contenders has one called {contender.name!r}; use "
                "lower-case letters, digits and dashes"
            )
        if contender.name in (*found, *NETWORKS):
            raise TaskError(
                f"{type(task).__name__}.contenders has one called {contender.name!r}, as another "
                "contender is called already; give it a name of its own"
            )
        found[contender.name] = contender
    return found


def _no_network(task: Task, own: Params) -> Contender:
    if isinstance(task, AnomalyTask):
        return IsolationForest(task, own)
    return GaussianMixture(task, own) if isinstance(task, ClusterTask) else Boosting(task, own)


def params_of(task: Task, name: str, params: Params) -> Params:
    """Give the hyper-parameters that stand for a contender in a run, a lineage, a campaign.

    Args:
        task: the Task.
        name: of the contender.
        params: of the Task's own model.
    """
    kept = (FEATURES, CLUSTERS) if isinstance(task, ClusterTask) else (FEATURES,)
    shared = {each: params[each] for each in kept if each in params}
    if name == OWN:
        return {**params, ARCHITECTURE: OWN} if ARCHITECTURE in params else params
    if name in NETWORKS:
        return {**task.defaults, **shared, ARCHITECTURE: name}
    return {**shared, ARCHITECTURE: name}


def contender_of(task: Task, params: Params, config: "TrainConfig") -> Contender:
    """Give the contender that hyper-parameters stand for.

    Raises:
        TaskError: there is none of that name.
    """
    if is_network(params):
        return NetworkContender(task, params, config)
    name, known = architecture_of(params), contenders_of(task, config, params)
    if name not in known:
        raise TaskError(
            f"{type(task).__name__} has no contender {name!r}; there are {', '.join(known)}"
        )
    return known[name]
