"""Mixtures of Gaussians as a contender, for Tasks that look for clusters.

Expectation and maximisation (Dempster, Laird and Rubin, 1977), which scikit-learn does, gives each
cluster a shape of its own where k-means knows balls alone. A row belongs to the component that most
likely made it. What is exported is a network of the fitted figures, so that distances mean what
they mean in `minga.training.clusters`.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minga.training.clusters import CLUSTERS, Clusters, ClusterTask
from minga.training.errors import DataError
from minga.training.evaluate import predict
from minga.training.models import NetworkModel
from minga.training.network import build_preparation
from minga.training.selection.graphs import prepared_by

if TYPE_CHECKING:
    from minga.training.space import Params
    from minga.training.task import Split

MIXTURE = "gaussian-mixture"

NUM_STARTS = 3
FLOOR = 1e-4
"""Is added to variances, so that a column that does not vary in a cluster does no harm."""


class GaussianMixture:
    """A mixture for a Task that looks for clusters."""

    name = MIXTURE

    def __init__(self, task: ClusterTask, params: "Params") -> None:
        self._task = task
        self._params = params

    def fit(self, train: "Split", validation: "Split", *, seed: int) -> NetworkModel:
        """Fit as many components as the Task has clusters.

        Raises:
            DataError: there are fewer rows than clusters.
        """
        from sklearn.mixture import GaussianMixture as Mixture

        torch.manual_seed(seed)
        preparation = prepared_by(build_preparation(self._task, self._params, train))
        rows = predict(preparation, train.inputs).astype(np.float64)
        num_clusters = int(self._params[CLUSTERS])
        if len(rows) < num_clusters:
            raise DataError(f"{len(rows)} rows for {num_clusters} clusters; give more rows")
        fitted = Mixture(num_clusters, n_init=NUM_STARTS, reg_covar=FLOOR, random_state=seed)
        fitted.fit(rows)
        model = Shapes(fitted.means_, fitted.precisions_cholesky_, fitted.weights_)
        network = nn.Sequential(OrderedDict(preparation=preparation, model=model))
        self._task.finish(network, validation)
        return NetworkModel(network, train.inputs)


class Shapes(Clusters):
    """Centres with a shape around each.

    Squared distances are, but for a constant, twice the negative logarithm of a component's share
    in a row's likelihood.

    Args:
        means: shape `(clusters, width)`.
        whitening: makes a unit ball of a cluster's shape, shape `(clusters, width, width)`.
        weights: of the components.
    """

    whitening: Tensor
    offset: Tensor

    def __init__(
        self,
        means: NDArray[np.float64],
        whitening: NDArray[np.float64],
        weights: NDArray[np.float64],
    ) -> None:
        num_clusters, width = means.shape
        super().__init__(width, num_clusters)
        diagonals = np.diagonal(whitening, axis1=1, axis2=2)
        offset = -2 * (np.log(diagonals).sum(axis=1) + np.log(weights))
        # Only differences between clusters matter; the least is 0, so that roots can be taken.
        self.register_buffer("offset", torch.tensor(offset - offset.min(), dtype=torch.float32))
        self.register_buffer("whitening", torch.tensor(whitening, dtype=torch.float32))
        with torch.no_grad():
            self.centres.copy_(torch.from_numpy(means))

    def squared_distances(self, rows: Tensor) -> Tensor:
        """Give the squared distances of rows to all centres, shape `(batch, clusters)`."""
        apart = (rows.unsqueeze(1) - self.centres).unsqueeze(2)
        return torch.matmul(apart, self.whitening).square().sum(dim=(2, 3)) + self.offset
