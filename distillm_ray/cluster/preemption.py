"""Which nodes the cluster will take away soon, and which failures of learners come from that."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import PreemptionError, WorkerGroupError


def leaving_nodes() -> frozenset[str]:
    """Ids of the nodes that Ray drains: after a preemption notice, or before they are scaled down.

    A node started by `ray start --block` is drained when it gets SIGTERM, for
    `RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S`. Ray Train's own notice comes up to five seconds
    later, by a collective and a process more, and is turned off in connection.py.
    """
    state: Any = ray._private.state.state  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
    return frozenset(state.get_draining_nodes())


def is_preemption(error: BaseException) -> bool:
    """Whether Ray says that ranks ended because a node was taken away after a notice.

    It does not where the processes of the node ended before the node itself.
    """
    if isinstance(error, PreemptionError):
        return True
    if not isinstance(error, WorkerGroupError):
        return False
    causes = (
        one.health_check_failure if isinstance(one, WorkerHealthCheckFailedError) else one
        for one in error.worker_failures.values()
    )
    return any(isinstance(cause, RayActorError) and cause.preempted for cause in causes)
