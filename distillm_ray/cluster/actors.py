"""How a role becomes a Ray actor, and how its calls are waited for.

The files beside this one define the actors of each role and their clients. An actor's methods carry
`@ray.method` and its handle has the type `ActorProxy[...]`, so that the type checker sees every
remote call. No actor is detached: when the driver ends, however it ends, its actors end with it.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar, cast

import ray
from ray.actor import ActorClass, ActorHandle, ActorProxy
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from distillm_ray.cluster.placement import RoleSpec
from distillm_ray.errors import ClusterError, UserError
from distillm_ray.types import Device

A = TypeVar("A")
Result = TypeVar("Result")

MAX_CONCURRENCY = 1000  # calls that an asynchronous actor may have open
CALL_TIMEOUT_S = 120.0  # of calls that only read or change a little state
_POLL_S = 0.5  # interval at which `interrupt` is called during a wait


class BufferLost(Exception):
    """The replay buffer's process died and its successor has not been restored.

    A learner fails with it. Ray Train then restarts the group from the last checkpoint, which also
    restores the buffer.
    """


# ---- start and end -------------------------------------------------------------------------------


def pooled(
    role: type[A],
    spec: RoleSpec,
    device: Device,
    place: PlacementGroupSchedulingStrategy | None = None,
) -> ActorClass[A]:
    """An actor class of a pool. Ray restarts its processes; the pool decides about its calls.

    `place`: where it runs, in all of its lives; None: wherever there is room.
    """
    where: dict[str, Any] = {"label_selector": dict(spec.node_labels)}
    if place is not None:
        where = {"scheduling_strategy": place}
    return _remote(
        role,
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=MAX_CONCURRENCY,
        **where,
        runtime_env={"env_vars": thread_settings(spec.num_threads, device)},
    )


def beside_driver(
    role: type[A], *, survives: bool = False, concurrent: bool = True
) -> ActorClass[A]:
    """An actor class that only coordinates, on the driver's node and nowhere else.

    With soft affinity Ray also takes another node while this one starts processes, and losing that
    node would end the run.

    Args:
        survives: restart it after a crash and repeat the calls that the crash interrupted.
        concurrent: it is asynchronous and serves many calls at a time.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _remote(
        role,
        num_cpus=0,
        max_restarts=-1 if survives else 0,
        max_task_retries=-1 if survives else 0,
        max_concurrency=MAX_CONCURRENCY if concurrent else 1,
        scheduling_strategy=here,
    )


def spread(role: type[A], *, retries: int) -> ActorClass[A]:
    """An actor class whose instances Ray spreads over the nodes; its calls may be repeated."""
    return _remote(
        role, num_cpus=0, max_restarts=-1, max_task_retries=retries, scheduling_strategy="SPREAD"
    )


def _remote(role: type[A], **options: Any) -> ActorClass[A]:
    decorate: Any = ray.remote  # its annotations know only some of its options
    return decorate(**options)(role)


def kill(actor: ActorProxy[Any], *, no_restart: bool) -> None:
    """End an actor's process."""
    ray.kill(cast(ActorHandle, actor), no_restart=no_restart)


def release(actors: Sequence[ActorProxy[Any]]) -> None:
    """End actors for good and return their CPUs and GPUs."""
    for actor in actors:
        kill(actor, no_restart=True)


def thread_settings(num_threads: int, device: Device) -> dict[str, str]:
    """Environment variables for roles that share the cores and the memory of a node.

    Idle OpenMP threads sleep instead of spinning, and glibc keeps few heaps. On the CPU glibc (2.35
    and newer) also asks for huge pages: torch maps fresh memory for every tensor, and page faults
    took a sixth of a learner's step.
    """
    settings = {
        "MALLOC_ARENA_MAX": "2",
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "KMP_BLOCKTIME": "0",
    }
    if device == "cpu":
        tunables = (os.environ.get("GLIBC_TUNABLES"), "glibc.malloc.hugetlb=1")
        settings["GLIBC_TUNABLES"] = ":".join(filter(None, tunables))
    return settings


# ---- calls ---------------------------------------------------------------------------------------


def ask(
    call: ray.ObjectRef[Result],
    what: str,
    *,
    timeout_s: float = CALL_TIMEOUT_S,
    interrupt: Callable[[], None] | None = None,
) -> Result:
    """The result of a remote call, within a limit.

    Args:
        what: who should have replied, for the message; names the config key of the limit, if any.
        interrupt: called twice a second while waiting; what it raises ends the wait.

    Raises:
        UserError: raised by the call itself, or ClusterError when the limit has passed.
        BufferLost: raised by the call itself.
    """
    left_s = timeout_s
    while interrupt is not None and left_s > _POLL_S:
        if ray.wait([call], timeout=_POLL_S)[0]:
            break
        interrupt()
        left_s -= _POLL_S
    try:
        return ray.get(call, timeout=left_s)
    except GetTimeoutError as error:
        raise ClusterError(
            f"no reply within {timeout_s:g} s: {what}; the process hangs, or the cluster is"
            " overloaded; see the log of the driver's node"
        ) from error
    except RayTaskError as error:
        if isinstance(error.cause, UserError | BufferLost):
            raise error.cause from error
        raise


async def reply(call: Awaitable[Result], what: str, *, timeout_s: float = CALL_TIMEOUT_S) -> Result:
    """`ask` for asynchronous roles.

    Raises:
        ClusterError: the limit has passed.
    """
    try:
        return await asyncio.wait_for(call, timeout_s)
    except TimeoutError as error:
        raise ClusterError(
            f"no reply within {timeout_s:g} s: {what}; the process hangs, or the cluster is"
            " overloaded; see the log of the driver's node"
        ) from error


def cause_of(error: BaseException) -> BaseException:
    """The exception that was raised inside the actor, where Ray hands one on."""
    return error.cause if isinstance(error, RayTaskError) else error


def one_line(error: BaseException, limit: int = 300) -> str:
    """Type and message of an error, for a log."""
    cause = cause_of(error)
    text = " ".join(f"{type(cause).__name__}: {cause}".split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
