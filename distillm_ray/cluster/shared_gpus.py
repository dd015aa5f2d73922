"""Where colocated processes run: each generator shares its GPU with one learner.

Ray Train makes the placement group of its workers itself, so two groups meet on the same GPUs. The
generators' group comes first. Each of its bundles is more than half of a GPU, so that no two are on
one. A learner asks for the rest of a GPU, on the node of a generator. Ray gives a part of a GPU
from the one with the smallest sufficient rest: the one with a generator, and never the one with
another learner.
"""

from __future__ import annotations

from collections.abc import Mapping

from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from distillm_ray.cluster.placement import RoleSpec
from distillm_ray.errors import ClusterError

NODE_LABEL = "ray.io/node-id"  # which Ray gives to every node


def bundles(spec: RoleSpec) -> list[dict[str, float]]:
    """The resources of each process of a role; at least a little, because Ray wants some."""
    each = {"CPU": spec.cpus, "GPU": spec.gpus}
    each = {name: amount for name, amount in each.items() if amount} or {"CPU": 0.01}
    return [dict(each) for _ in range(spec.count)]


class SharedGpus:
    """The reserved places of a run's generators. They stay when a process dies, and with `remove`
    they go.
    """

    def __init__(self, spec: RoleSpec) -> None:
        self._labels = dict(spec.node_labels)
        self._group = placement_group(
            bundles(spec), strategy="PACK", bundle_label_selector=[self._labels] * spec.count
        )

    def place(self, index: int) -> PlacementGroupSchedulingStrategy:
        """Where generator `index` runs, in each of its lives."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)

    def node_labels(self, limit_s: float) -> list[dict[str, str]]:
        """For each learner, the labels of the node on which it shares a GPU.

        Waits while Ray looks for the place of a generator, as after the loss of a node.

        Raises:
            ClusterError: it found none within `limit_s`.
        """
        if not self._group.wait(timeout_seconds=limit_s):
            raise ClusterError(
                f"no place for the generators within run.startup_timeout_s = {limit_s:g} s, so"
                " there is none for the learners that share their GPUs: has a node been lost?"
            )
        nodes: Mapping[int, str] = placement_group_table(self._group)["bundles_to_node_id"]
        return [self._labels | {NODE_LABEL: nodes[index]} for index in sorted(nodes)]

    def remove(self) -> None:
        """Return the places. What still runs there is ended."""
        remove_placement_group(self._group)
