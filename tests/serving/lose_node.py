"""Loses one of three machines under constant load: a script, for its Ray is not the tests'.

It prints one line of JSON: how many requests were answered and which failed.

Words: the model's file, its SHA-256.
"""

import json
import sys
import threading

import numpy as np
import ray
from ray.cluster_utils import Cluster

from minga.inference.client import InferenceClient
from minga.inference.engine import ModelRef
from minga.inference.errors import ClientError
from minga.serving.config import ServingConfig
from minga.serving.host import start
from tests.serving.test_host import replica_pids, wait_until


class Callers:
    """Closed-loop callers who count."""

    def __init__(self, url: str, count: int) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        with InferenceClient(self._url) as client:
            while not self._stop.is_set():
                try:
                    client.infer("scaling", {"input": np.ones((1, 3), np.float32)})
                except ClientError as error:
                    self.failures.append(str(error))
                else:
                    self.answered += 1


def main(path: str, sha256: str) -> None:
    """Serve from two machines, lose one, and go on."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 0})
    try:
        callers = lose_one(cluster, ModelRef(name="scaling", version="1", path=path, sha256=sha256))
        sys.stdout.write(json.dumps({"answered": callers.answered, "failures": callers.failures}))
        sys.stdout.write("\n")
    finally:
        ray.shutdown()
        cluster.shutdown()


def lose_one(cluster: Cluster, ref: ModelRef) -> Callers:
    """Give what callers counted from before the loss until the lost replica is back."""
    machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
    config = ServingConfig(port=0, num_replicas=2, cpus_per_replica=1.0)
    host = start(config, [ref])
    host.wait_ready()
    callers = Callers(host.url, 4)
    try:
        wait_until(lambda: callers.answered > 100, "nothing is answered")
        before = replica_pids()
        cluster.remove_node(machines[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        wait_until(lambda: len(replica_pids() & before) == 1, "the machine is not missed")
        wait_until(lambda: len(replica_pids()) == 2, "the replica does not come back")
        answered = callers.answered
        wait_until(lambda: callers.answered > answered + 300, "nothing is answered in the end")
    finally:
        callers.stop()
    return callers


if __name__ == "__main__":
    main(*sys.argv[1:3])
