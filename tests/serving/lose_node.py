"""Loses one of three machines under constant load: a script, for its Ray is not the tests'.

It prints one line of JSON: how many requests were answered, and which failed, of callers who ask
again what nobody has answered, over HTTP and gRPC, and of those who do not (`resets`).

Words: the model's file, its SHA-256.
"""

import contextlib
import json
import sys
from collections.abc import Sequence

import ray
from ray.cluster_utils import Cluster

from minga.inference.engine import ModelRef
from minga.serving.config import ServingConfig
from minga.serving.host import start
from tests.serving.conftest import Load
from tests.serving.test_host import replica_pids, wait_until


def main(path: str, sha256: str) -> None:
    """Serve from two machines, lose one, and go on."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0})
    try:
        ref = ModelRef(name="scaling", version="1", path=path, sha256=sha256)
        *patient, hasty = lose_one(cluster, ref)
        told = {
            "answered": [len(callers.factors) for callers in patient],
            "failures": [words for callers in patient for words in callers.failures],
            "resets": hasty.failures,
            "factors": sorted({factor for each in (*patient, hasty) for factor in each.factors}),
        }
        sys.stdout.write(json.dumps(told) + "\n")
    finally:
        ray.shutdown()
        cluster.shutdown()


def lose_one(cluster: Cluster, ref: ModelRef) -> list[Load]:
    """Give what callers counted from before the loss until the lost replica is back."""
    machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
    config = ServingConfig(port=0, grpc_port=0, num_replicas=2, cpus_per_replica=1.0)
    host = start(config, [ref])
    host.wait_ready()
    patient = [Load(url, num_callers=2, retries=3) for url in (host.url, host.grpc_url)]
    hasty = Load(host.url, num_callers=2)
    with contextlib.ExitStack() as stack:
        for callers in (*patient, hasty):
            stack.enter_context(callers)

        def all_answered(more: Sequence[int]) -> bool:
            return all(len(one.factors) > count for one, count in zip(patient, more, strict=True))

        wait_until(lambda: all_answered((100, 100)), "nothing is answered")
        before = replica_pids()
        cluster.remove_node(machines[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: len(replica_pids() & before) == 1, "the machine is not missed")
        wait_until(lambda: len(replica_pids()) == 2, "the replica does not come back")
        more = [len(callers.factors) + 200 for callers in patient]
        wait_until(lambda: all_answered(more), "nothing is answered in the end")
    return [*patient, hasty]


if __name__ == "__main__":
    main(*sys.argv[1:3])
