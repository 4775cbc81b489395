"""A Ray cluster of three nodes as processes of this machine, for scripts that tests run in a process of their own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Before ray is imported: no look at the internet, and no wait for machines that would be slow to answer.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("RAY_health_check_failure_threshold", "10")

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

START_TRIES = 3
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


class ThreeNodes:
    """The head has no room for ranks and replicas, but a resource `head`; each of three nodes has room for one."""

    def __init__(self) -> None:
        head = {**NODE, "num_cpus": 0, "resources": {"head": 1}, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[str, Any] = {}
        for _ in range(3):
            self.add()
        os.environ["RAY_ADDRESS"] = self.cluster.address

    def add(self) -> None:
        """Start a node. On a busy machine Ray gives up waiting for one that comes later: that is tried again."""
        for left in range(START_TRIES - 1, -1, -1):
            try:
                node = self.cluster.add_node(**NODE)
                break
            except Exception as error:
                if not left or "timed out during startup" not in str(error):
                    raise
        self.nodes[node.node_id] = node

    def kill(self, node_id: str) -> None:
        """Kill all processes of a node at once, as if its machine had lost power."""
        self.cluster.remove_node(self.nodes.pop(node_id), allow_graceful=False)


@contextmanager
def three_nodes() -> Iterator[ThreeNodes]:
    started = ThreeNodes()
    try:
        yield started
    finally:
        ray.shutdown()  # the driver's connection, before the node that it is to
        started.cluster.shutdown()


def nodes_of(class_name: str) -> list[str]:
    """Return the node of each living actor whose class has this name, or one that contains it."""
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    alive = actors(actor_state_name="ALIVE").values()
    return [actor["Address"]["NodeID"] for actor in alive if class_name in actor["ActorClassName"]]
