"""Tasks without targets: which rows are alike.

A `ClusterTask` needs a name, columns and data. Its own model is k-means as a network: centres that
follow the gradient of the rows' squared distances to the nearest of them (Bottou and Bengio,
"Convergence properties of the k-means algorithms", NIPS 1994), from where Lloyd's algorithm puts
them in a sample, begun by k-means++ (Arthur and Vassilvitskii, SODA 2007). So it is searched,
trained by several workers, trained further and federated as any network is. `minga run --auto`
compares it with a mixture of Gaussians.

For each row a model answers its cluster, how far from that cluster's centre it is (above 1: farther
than the cluster's own rows are, but for a share `strangers` of them), and how clear the choice was:
from 0, half-way to the next centre, to 1.

Nobody knows the right cluster, so the rows themselves are the targets, prepared as for the model.
Clusters are judged there by the simplified silhouette (Hruschka, de Campos and de Castro, 2006; see
Vendramin, Campello and Hruschka, "Relative clustering validity criteria", 2010): how much nearer to
the middle of its own cluster a row is than to the middle of the next one. The middles are those of
the rows that are judged, so it does not matter how a model came by its clusters, and a candidate
and a champion are held against each other on equal terms.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minga.training.data.tables import shuffled
from minga.training.errors import TaskError
from minga.training.evaluate import predict
from minga.training.space import Maximize, Params, choice, loguniform
from minga.training.stored import sample_of
from minga.training.task import OutputKind, Split, Splits, Task

CLUSTERS = "clusters"
"""The hyper-parameter that says how many there are."""

NUM_STARTS = 3
"""The best of so many beginnings is taken."""

MIN_ROWS = 30
"""Fewer rows of a cluster say nothing about how far from its centre rows are; all rows do then."""

_TINY = 1e-12


class ClusterTask(Task):
    """Find groups of rows that are alike, by k-means unless `model` is overridden.

    Give `name`, `columns` and `data`, which `divided` makes of a table. `clusters` in `defaults`
    says how many groups; the default space searches over that too.

    Attributes:
        strangers: share of a cluster's rows of the validation split whose distance is above 1.
    """

    defaults = {"lr": 1e-2, "batch_size": 64, "clusters": 4}  # noqa: RUF012 - as in Tasks
    search_space = {  # noqa: RUF012
        "lr": loguniform(1e-3, 3e-2),
        "clusters": choice([2, 3, 4, 5, 6, 8]),
    }
    objective = Maximize("silhouette")
    outputs: ClassVar[Mapping[str, OutputKind]] = {
        "cluster": "category",
        "distance": "number",
        "clearness": "number",
    }
    strangers: ClassVar[float] = 0.01

    def divided(
        self, inputs: NDArray[Any], *, seed: int = 0, validation: float = 0.2, test: float = 0.2
    ) -> Splits:
        """Divide rows at random, and make each its own target.

        Args:
            inputs: shape `(n, columns)`.
            seed: of the division.
            validation: share of the rows.
            test: share of the rows.

        Raises:
            DataError: the shares leave nothing to learn from.
        """
        zeros = np.zeros(len(inputs), np.float32)
        splits = shuffled(inputs, zeros, seed=seed, validation=validation, test=test)
        preparation = self.preparation(splits.train)

        def judged_by_itself(split: Split) -> Split:
            return Split(inputs=split.inputs, targets=predict(preparation, split.inputs))

        return Splits(
            train=judged_by_itself(splits.train),
            validation=judged_by_itself(splits.validation),
            test=judged_by_itself(splits.test),
        )

    def model(self, params: Params) -> nn.Module:
        """Build centres of prepared rows.

        Raises:
            TaskError: there are not even two clusters to tell apart.
        """
        num_clusters = int(params[CLUSTERS])
        if num_clusters < 2:
            raise TaskError(f"clusters = {num_clusters}; two is the least that can be told apart")
        return Clusters(self.width, num_clusters)

    def begin(self, network: nn.Module, train: Split, *, seed: int) -> None:
        """Put the centres where Lloyd's algorithm does in a sample of the training split."""
        from sklearn.cluster import KMeans
        from threadpoolctl import threadpool_limits

        clusters = clusters_of(network)
        if clusters is None:
            return
        rows = predict(network.get_submodule("preparation"), sample_of(train.inputs))
        if len(rows) >= len(clusters.centres):  # else these are a device's, and weights will come
            kmeans = KMeans(len(clusters.centres), n_init=NUM_STARTS, random_state=seed)
            with threadpool_limits(1), torch.no_grad():  # one thread, so that it repeats bit by bit
                clusters.centres.copy_(torch.from_numpy(kmeans.fit(rows).cluster_centers_))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002 - rows are outputs'
        """Give the mean squared distance of rows to their centres."""
        return outputs[:, 1].square().mean()

    def metrics(self, outputs: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
        """Judge clusters by the rows in them.

        `silhouette` as the module says; `strangers`, the share of rows whose distance is above 1;
        `smallest`, the share of rows in the smallest cluster that has any.
        """
        numbers = outputs[:, 0].round().astype(np.int64)
        shares = np.unique(numbers, return_counts=True)[1] / max(len(numbers), 1)
        return {
            "silhouette": simplified_silhouette(numbers, targets),
            "strangers": float((outputs[:, 1] > 1).mean()),
            "smallest": float(shares.min()),
        }

    def finish(self, network: nn.Module, validation: Split) -> None:
        """Measure on the validation split how far from their centres rows are."""
        clusters = clusters_of(network)
        if clusters is None:
            return
        clusters.radius.fill_(1.0)
        outputs = predict(network, validation.inputs)
        everywhere = _reach(outputs[:, 1], self.strangers)
        for number in range(len(clusters.radius)):
            distances = outputs[outputs[:, 0] == number, 1]
            is_enough = len(distances) >= MIN_ROWS
            clusters.radius[number] = _reach(distances, self.strangers) if is_enough else everywhere


class Clusters(nn.Module):
    """The nearest of several centres.

    Args:
        width: of the rows.
        num_clusters: how many centres.

    Attributes:
        centres: shape `(clusters, width)`.
        radius: distance of a cluster that is called 1, shape `(clusters,)`; while it is in
            training distances are what they are.
    """

    radius: Tensor

    def __init__(self, width: int, num_clusters: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(num_clusters, width))
        self.register_buffer("radius", torch.ones(num_clusters))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the exported model's input name
        """Give cluster, distance and clearness of each row, shape `(batch, 3)`."""
        distances = self.squared_distances(input).clamp(min=_TINY).sqrt()
        nearest, places = torch.topk(distances, 2, dim=1, largest=False)
        first, number = nearest[:, 0], places[:, 0]
        distance = first if self.training else first / self.radius[number]
        clearness = 1 - first / nearest[:, 1]
        return torch.stack([number.to(first.dtype), distance, clearness], dim=1)

    def squared_distances(self, rows: Tensor) -> Tensor:
        """Give the squared distances of rows to all centres, shape `(batch, clusters)`."""
        # Differences first: the shorter formula loses the digits that decide between two centres.
        return (rows.unsqueeze(1) - self.centres).square().sum(dim=2)


def clusters_of(network: nn.Module) -> Clusters | None:
    """Find the clusters in a network; None if its model is of another kind."""
    return next((part for part in network.modules() if isinstance(part, Clusters)), None)


def simplified_silhouette(numbers: NDArray[np.int64], rows: NDArray[Any]) -> float:
    """Judge clusters by the rows in them: from -1 to 1, more is better.

    Args:
        numbers: cluster of each row, shape `(n,)`.
        rows: shape `(n, ...)`.

    Returns:
        the mean over rows; one that is alone in its cluster counts 0 (Rousseeuw 1987). NaN if all
        rows are in one cluster.
    """
    used, places, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    if len(used) < 2:
        return float("nan")
    table = np.asarray(rows, np.float64).reshape(len(rows), -1)
    middles = np.stack([table[places == place].mean(axis=0) for place in range(len(used))])
    distances = np.stack([np.linalg.norm(table - middle, axis=1) for middle in middles], axis=1)
    each = np.arange(len(table))
    own = distances[each, places]
    distances[each, places] = np.inf
    other = distances.min(axis=1)
    silhouettes = (other - own) / np.maximum(np.maximum(own, other), _TINY)
    return float(np.where(counts[places] > 1, silhouettes, 0.0).mean())


def _reach(distances: NDArray[Any], strangers: float) -> float:
    """Give the distance that so small a share of rows is beyond."""
    return max(float(np.quantile(distances, 1 - strangers)), math.sqrt(_TINY))
