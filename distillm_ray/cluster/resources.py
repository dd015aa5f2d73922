"""What a config asks of the cluster, and whether a cluster has it. Pure: nothing is started here.

Ray keeps an actor pending for as long as its resources are missing, without a word. So the sum is
made first, and a shortage names what was asked, what is there, and the key to lower. The replay
buffer, the stores, the rollout loop and the log are small and ask for no CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from rich.console import Console
from rich.table import Table

from distillm_ray.config import Config
from distillm_ray.config_files import dump_config
from distillm_ray.errors import ClusterError

Device: TypeAlias = Literal["cuda", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleRequest:
    """The actors of one role. Each one must fit on a single node."""

    role: str
    count: int
    cpus: float  # per actor
    gpus: float  # per actor
    count_key: str  # the config key to lower
    cpus_key: str
    gpus_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything a run asks for at the same time."""

    device: Device
    roles: tuple[RoleRequest, ...]
    object_store_bytes: int

    @property
    def cpus(self) -> float:
        """CPUs of all actors."""
        return sum(role.count * role.cpus for role in self.roles)

    @property
    def gpus(self) -> float:
        """GPUs of all actors."""
        return sum(role.count * role.gpus for role in self.roles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one node of the cluster offers."""

    cpus: float
    gpus: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Available:
    """What the cluster offers to this run."""

    nodes: tuple[Node, ...]
    object_store_bytes: int | None = None  # of all nodes; None: not known

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)


def wants_generators(config: Config) -> bool:
    """Whether anything is generated: rollouts, and probes with them, or the evaluation."""
    return config.wants_rollouts or config.evaluation.at_end


def request(config: Config, device: Device) -> Request:
    """What `config` asks for on that device.

    Without `num_gpus` in a role's section, a generator or scorer asks for `tensor_parallel` GPUs
    and a learner for one; on the CPU for none. The object store must hold the teacher targets.
    """

    def gpus(explicit: float | None, default: int) -> float:
        if device == "cpu":
            return 0.0
        return float(default) if explicit is None else explicit

    learner = RoleRequest(
        role="learner",
        count=config.learner.workers,
        cpus=config.learner.num_cpus,
        gpus=gpus(config.learner.num_gpus, 1),
        count_key="learner.workers",
        cpus_key="learner.num_cpus",
        gpus_key="learner.num_gpus",
    )
    roles = [learner]
    pools = (
        ("generator", "rollout", config.rollout, wants_generators(config)),
        ("scorer", "teacher", config.teacher, config.loss.needs_teacher),
    )
    for role, section, pool, wanted in pools:
        if wanted:
            roles.append(
                RoleRequest(
                    role=role,
                    count=pool.actors,
                    cpus=pool.num_cpus,
                    gpus=gpus(pool.num_gpus, pool.tensor_parallel),
                    count_key=f"{section}.actors",
                    cpus_key=f"{section}.num_cpus",
                    gpus_key=f"{section}.tensor_parallel"
                    if pool.num_gpus is None
                    else f"{section}.num_gpus",
                )
            )
    return Request(
        device=device,
        roles=tuple(roles),
        object_store_bytes=config.targets.max_bytes if config.loss.needs_teacher else 0,
    )


def check(request: Request, available: Available) -> None:
    """Refuse a request that the cluster can never meet.

    Raises:
        ClusterError: with what was asked, what is there, and which key to lower.
    """
    problems: list[str] = []
    for name, asked, there in (
        ("CPU", request.cpus, available.cpus),
        ("GPU", request.gpus, available.gpus),
    ):
        if asked > there:
            problems.append(
                f"{_amount(asked)} {name}s asked for ({_breakdown(request, name)}),"
                f" {_amount(there)} in the cluster; {_remedy(request, name)}"
            )
    if not problems:
        problems = _unplaceable(request, available.nodes)
    store = available.object_store_bytes
    if store is not None and request.object_store_bytes > store:
        problems.append(
            f"targets.max_bytes is {request.object_store_bytes:,}, the object stores of the cluster"
            f" hold {store:,} bytes; lower targets.max_bytes, or start Ray with a larger"
            " --object-store-memory"
        )
    if problems:
        raise ClusterError("the cluster is too small for this config:\n  " + "\n  ".join(problems))


def render_show(config: Config, device: Device) -> str:
    """The resolved tree as YAML, then the request as a table: what `distillm-ray show` prints."""
    asked = request(config, device)
    table = Table(title=f"asked of the cluster (device: {device})", title_justify="left")
    for name in ("role", "actors", "CPUs each", "GPUs each", "CPUs", "GPUs", "set by"):
        table.add_column(name, justify="left" if name in ("role", "set by") else "right")
    for role in asked.roles:
        table.add_row(
            role.role,
            str(role.count),
            _amount(role.cpus),
            _amount(role.gpus),
            _amount(role.count * role.cpus),
            _amount(role.count * role.gpus),
            ", ".join(
                [role.count_key, role.cpus_key, *([role.gpus_key] if device == "cuda" else [])]
            ),
        )
    table.add_section()
    table.add_row("together", "", "", "", _amount(asked.cpus), _amount(asked.gpus), "")
    console = Console(width=110, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
        if asked.object_store_bytes:
            gib = asked.object_store_bytes / 2**30
            console.print(
                f"object store: {gib:.2f} GiB for teacher targets (targets.max_bytes),"
                " and one copy of the published weights"
            )
    return f"{dump_config(config)}\n{capture.get()}"


def _unplaceable(request: Request, nodes: Sequence[Node]) -> list[str]:
    """First-fit decreasing: enough in total, but an actor cannot be split over nodes."""
    free = [[node.cpus, node.gpus] for node in nodes]
    largest_first = sorted(request.roles, key=lambda role: (role.gpus, role.cpus), reverse=True)
    for role in largest_first:
        for placed in range(role.count):
            home = next(
                (place for place in free if place[0] >= role.cpus and place[1] >= role.gpus),
                None,
            )
            if home is None:
                keys = [role.count_key, role.cpus_key]
                if role.gpus > 0:
                    keys.append(role.gpus_key)
                offers = ", ".join(
                    f"{_amount(node.cpus)} CPUs and {_amount(node.gpus)} GPUs" for node in nodes
                )
                return [
                    (
                        f"only {placed} of {role.count} {role.role} actors fit: each needs"
                        f" {_amount(role.cpus)} CPUs and {_amount(role.gpus)} GPUs on one node, the"
                        f" nodes have {offers}; lower {' or '.join(keys)}"
                    )
                ]
            home[0] -= role.cpus
            home[1] -= role.gpus
    return []


def _breakdown(request: Request, name: str) -> str:
    parts = []
    for role in request.roles:
        each = role.cpus if name == "CPU" else role.gpus
        if each > 0:
            parts.append(f"{role.count} {role.role} x {_amount(each)}")
    return ", ".join(parts)


def _remedy(request: Request, name: str) -> str:
    keys = []
    for role in request.roles:
        each = role.cpus if name == "CPU" else role.gpus
        if each <= 0:
            continue
        if role.count > 1:
            keys.append(role.count_key)
        keys.append(role.cpus_key if name == "CPU" else role.gpus_key)
    return f"lower {', '.join(keys[:-1])} or {keys[-1]}" if len(keys) > 1 else f"lower {keys[0]}"


def _amount(value: float) -> str:
    return f"{value:g}"
