"""What each phase of a job asks of the cluster: the one list of its roles.

`distillm-ray show`, the check before the start and the start itself read this list. It is pure:
nothing is started here.

    train        training: learners, generators, scorers
                 evaluation of the student, where the run's generators were lost
                 evaluation of the teacher
    evaluate     evaluation of the student
    generate     generation
    score        scoring: scorers

Phases run one after the other, so each must fit alone. Ray keeps an actor pending, without an
error, for as long as its resources are missing; that is why the sums are checked first, of elastic
pools with the processes that they start with: more are used where there is room. Actors that
only coordinate (replay buffer, target stores, orchestrator, log, run control) ask for no CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from distillm_ray.config import Config, PoolConfig, ProcessConfig
from distillm_ray.config.files import dump_config
from distillm_ray.errors import ClusterError
from distillm_ray.types import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleSpec:
    """The processes of one role. Each must fit on a single node."""

    role: str
    section: str  # of the config; its keys set the numbers
    count: int  # that the role starts with and keeps
    most: int  # of an elastic pool, which asks for more where there is room; else `count`
    count_key: str  # of the config; empty where the count is not configurable
    cpus: float  # per process
    gpus: float  # per process
    gpus_key: str
    num_threads: int  # CPU threads per process
    node_labels: Mapping[str, str]  # that a node must have to run such a process

    @property
    def cpus_key(self) -> str:
        """The config key of `cpus`."""
        return f"{self.section}.num_cpus"

    @property
    def labels_key(self) -> str:
        """The config key of `node_labels`."""
        return f"{self.section}.node_labels"

    def keys(self, device: Device) -> list[str]:
        """The config keys that set what this role asks for."""
        keys = [self.count_key, self.cpus_key, self.gpus_key if device == "cuda" else ""]
        return [key for key in keys if key]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreUse:
    """What a run keeps in the object stores of its nodes."""

    stores: int = 0  # target stores, each on one node
    store_bytes: int = 0  # of one target store
    # On any node, since learners and generators may be on each:
    weights_bytes: int = 0  # published ones, and those before while generators still load them
    batch_bytes: int = 0  # copies of targets of the steps that the learners of a node prepare

    @property
    def target_bytes(self) -> int:
        """Of all target stores."""
        return self.stores * self.store_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Roles that run at the same time."""

    name: str
    roles: tuple[RoleSpec, ...]
    store_use: StoreUse = StoreUse()

    @property
    def cpus(self) -> float:
        """CPUs of all processes."""
        return _rounded(sum(role.count * role.cpus for role in self.roles))

    @property
    def gpus(self) -> float:
        """GPUs of all processes."""
        return _rounded(sum(role.count * role.gpus for role in self.roles))


# ---- the roles -----------------------------------------------------------------------------------


def learners(config: Config, device: Device) -> RoleSpec:
    """The Ray Train workers."""
    section = config.learner
    return _spec("learner", "learner", section, section.workers, "learner.workers", device)


def generators(config: Config, device: Device) -> RoleSpec:
    """The student's generators during training."""
    return _pool("generator", "rollout", config.rollout, device)


def scorers(config: Config, device: Device) -> RoleSpec:
    """The teacher's scorers."""
    assert config.teacher is not None
    return _pool("scorer", "teacher", config.teacher, device)


def student_evaluation(config: Config, device: Device) -> RoleSpec:
    """Generators that evaluate a student from its directory."""
    return _pool("student generator", "evaluation.student", config.evaluation.student, device)


def teacher_evaluation(config: Config, device: Device) -> RoleSpec:
    """Generators that evaluate the teacher."""
    assert config.evaluation.teacher is not None
    return _pool("teacher generator", "evaluation.teacher", config.evaluation.teacher, device)


def generation(config: Config, device: Device) -> RoleSpec:
    """Generators of `distillm-ray generate`."""
    return _pool("generator", "generate", config.generate, device)


def held_out_loss(config: Config, device: Device) -> RoleSpec:
    """The task that computes the held-out loss of a model directory."""
    section = config.evaluation.held_out_loss
    return _spec("held-out loss", "evaluation.held_out_loss", section, 1, "", device)


# ---- the phases ----------------------------------------------------------------------------------


def train_phases(
    config: Config, device: Device, *, weights_bytes: int = 0, batch_bytes: int = 0
) -> tuple[Phase, ...]:
    """The phases of `distillm-ray train`. For the sizes see `StoreUse`; 0: not known yet.

    That of a target store is not known while `targets.max_bytes` is `auto`.
    """
    roles = [learners(config, device)]
    if config.wants_generators:
        roles.append(generators(config, device))
    if config.loss.needs_teacher:
        roles.append(scorers(config, device))
    targets = config.targets
    use = StoreUse(
        stores=targets.stores if config.loss.needs_teacher else 0,
        store_bytes=0 if targets.max_bytes == "auto" else targets.limit // targets.stores,
        weights_bytes=weights_bytes if config.wants_generators else 0,
        batch_bytes=batch_bytes,
    )
    phases = [Phase(name="training", roles=tuple(roles), store_use=use)]
    if config.evaluation.at_end:
        phases += evaluate_phases(config, device)
        if config.evaluates_teacher:
            phases += _evaluation("teacher", teacher_evaluation(config, device), config, device)
    return tuple(phases)


def evaluate_phases(config: Config, device: Device) -> tuple[Phase, ...]:
    """The phases of `distillm-ray evaluate`."""
    return _evaluation("student", student_evaluation(config, device), config, device)


def generate_phases(config: Config, device: Device) -> tuple[Phase, ...]:
    """The phases of `distillm-ray generate`."""
    return (Phase(name="generation", roles=(generation(config, device),)),)


def score_phases(config: Config, device: Device) -> tuple[Phase, ...]:
    """The phases of `distillm-ray score`. Targets go to disk; none stays in the object store."""
    return (Phase(name="scoring", roles=(scorers(config, device),)),)


def _evaluation(model: str, pool: RoleSpec, config: Config, device: Device) -> tuple[Phase, Phase]:
    """The task waits for room where it does not fit beside the pool: two phases."""
    return (
        Phase(name=f"evaluation of the {model}", roles=(pool,)),
        Phase(
            name=f"held-out loss of the {model}",
            roles=(held_out_loss(config, device),),
        ),
    )


def _pool(role: str, section: str, pool: PoolConfig, device: Device) -> RoleSpec:
    return _spec(
        role,
        section,
        pool,
        pool.fewest,
        f"{section}.actors" if pool.most == pool.fewest else f"{section}.actors.min",
        device,
        most=pool.most,
        default_gpus=pool.tensor_parallel,
        default_gpus_key=f"{section}.tensor_parallel",
    )


def _spec(
    role: str,
    section: str,
    process: ProcessConfig,
    count: int,
    count_key: str,
    device: Device,
    *,
    most: int | None = None,
    default_gpus: float = 1,
    default_gpus_key: str = "",
) -> RoleSpec:
    """On a CPU no process asks for a GPU; on GPUs `num_gpus` overrides the role's default."""
    explicit = process.num_gpus is not None
    gpus_key = default_gpus_key if default_gpus_key and not explicit else f"{section}.num_gpus"
    gpus = process.num_gpus if process.num_gpus is not None else default_gpus
    return RoleSpec(
        role=role,
        section=section,
        count=count,
        most=count if most is None else most,
        count_key=count_key,
        cpus=process.num_cpus,
        gpus=gpus if device == "cuda" else 0.0,
        gpus_key=gpus_key,
        num_threads=process.num_threads,
        node_labels=process.node_labels,
    )


# ---- does it fit? --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one node of the cluster offers."""

    cpus: float
    gpus: float = 0.0
    object_store_bytes: int | None = None  # None: not known
    labels: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class Available:
    """What the cluster offers."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)


def check(phases: Sequence[Phase], available: Available) -> None:
    """Refuse phases that the cluster can never hold.

    Raises:
        ClusterError: with what the config asks for, what the cluster has, and the key to lower.
    """
    problems = [problem for phase in phases for problem in _problems(phase, available)]
    if problems:
        raise ClusterError("the cluster is too small for this config:\n  " + "\n  ".join(problems))


def _problems(phase: Phase, available: Available) -> list[str]:
    problems: list[str] = []
    for name, asked, there in (
        ("CPU", phase.cpus, available.cpus),
        ("GPU", phase.gpus, available.gpus),
    ):
        if asked > there:
            problems.append(
                f"{phase.name}: {_amount(asked)} {name}s asked for ({_breakdown(phase, name)}),"
                f" {_amount(there)} in the cluster; {_remedy(phase, name)}"
            )
    if not problems:
        problems = _unplaceable(phase, available.nodes)
    return problems + _beyond_stores(phase, available.nodes)


def room_for_targets(phase: Phase, nodes: Sequence[Node]) -> int | None:
    """Bytes that the phase's target stores can hold together; None: the nodes do not say.

    Ray spreads them over the nodes, any of which may be the smallest, beside weights and batches in
    transit. A tenth of a node's object store stays free for everything else.
    """
    room, count = _object_stores(nodes), phase.store_use.stores
    if room is None or count == 0:
        return None
    smallest = min(room) * 9 // 10 - _transit_bytes(phase, nodes)
    return count * max(smallest // math.ceil(count / len(room)), 0)


def _object_stores(nodes: Sequence[Node]) -> list[int] | None:
    """Bytes of each node's object store; None if a node does not say."""
    room = [node.object_store_bytes for node in nodes if node.object_store_bytes is not None]
    return room if room and len(room) == len(nodes) else None


def _batch_bytes(phase: Phase, nodes: Sequence[Node]) -> int:
    """On the node of their store, learners read targets without a copy."""
    return phase.store_use.batch_bytes if len(nodes) > 1 else 0


def _transit_bytes(phase: Phase, nodes: Sequence[Node]) -> int:
    """Of each node's object store, for weights and batches."""
    return phase.store_use.weights_bytes + _batch_bytes(phase, nodes)


def _beyond_stores(phase: Phase, nodes: Sequence[Node]) -> list[str]:
    """What the nodes' object stores cannot hold. Each target store is on one node."""
    use, room = phase.store_use, _object_stores(nodes)
    if room is None:
        return []
    transit_bytes = _transit_bytes(phase, nodes)
    free = [size - transit_bytes for size in room]
    hold = f"the object stores of the nodes hold {', '.join(f'{size:,}' for size in room)} bytes"
    transit = (
        f"{transit_bytes:,} on each node for weights and batches in transit"
        f" ({use.weights_bytes:,} and {_batch_bytes(phase, nodes):,})"
    )
    remedy = "start Ray with a larger --object-store-memory"
    if min(free) < 0:
        return [
            f"{phase.name}: {transit}, {hold}; lower learner.batch_size or learner.prefetch_steps,"
            f" or {remedy}"
        ]
    for _ in range(use.stores):
        largest = free.index(max(free))
        free[largest] -= use.store_bytes
        if free[largest] < 0:
            stores = "1 store" if use.stores == 1 else f"{use.stores} stores"
            return [
                f"{phase.name}: targets.max_bytes is {use.target_bytes:,} in {stores} of"
                f" {use.store_bytes:,}, each on one node, besides {transit}; {hold}; lower"
                f" targets.max_bytes, raise targets.stores up to the number of nodes, or {remedy}"
            ]
    return []


def _unplaceable(phase: Phase, nodes: Sequence[Node]) -> list[str]:
    """Enough in total, but a process cannot be split over nodes: first-fit decreasing."""
    free = [[node.cpus, node.gpus] for node in nodes]
    choosy_and_large_first = sorted(
        phase.roles,
        key=lambda role: (bool(role.node_labels), role.gpus, role.cpus),
        reverse=True,
    )
    for role in choosy_and_large_first:
        wanted = role.node_labels.items()
        for placed in range(role.count):
            home = next(
                (
                    place
                    for place, node in zip(free, nodes, strict=True)
                    if wanted <= node.labels.items()
                    and place[0] >= role.cpus
                    and place[1] >= role.gpus
                ),
                None,
            )
            if home is None:
                keys = role.keys("cuda" if role.gpus > 0 else "cpu")
                suitable = [node for node in nodes if wanted <= node.labels.items()]
                offers = ", ".join(
                    f"{_amount(node.cpus)} CPUs and {_amount(node.gpus)} GPUs" for node in suitable
                )
                labels, remedy = "", f"lower {' or '.join(keys)}"
                if wanted:
                    pairs = ", ".join(f"{key}={value}" for key, value in wanted)
                    labels, remedy = f" with {pairs}", f"{remedy}, or change {role.labels_key}"
                return [
                    f"{phase.name}: only {placed} of {role.count} {role.role} processes fit: each"
                    f" needs {_amount(role.cpus)} CPUs and {_amount(role.gpus)} GPUs on one"
                    f" node{labels}, the nodes{labels} have {offers or 'nothing: there is none'};"
                    f" {remedy}"
                ]
            home[0] = _rounded(home[0] - role.cpus)
            home[1] = _rounded(home[1] - role.gpus)
    return []


def _breakdown(phase: Phase, name: str) -> str:
    parts = []
    for role in phase.roles:
        each = role.cpus if name == "CPU" else role.gpus
        if each > 0:
            parts.append(f"{role.count} {role.role} x {_amount(each)}")
    return ", ".join(parts)


def _remedy(phase: Phase, name: str) -> str:
    keys = []
    for role in phase.roles:
        each = role.cpus if name == "CPU" else role.gpus
        if each <= 0:
            continue
        if role.count > 1:
            keys.append(role.count_key)
        keys.append(role.cpus_key if name == "CPU" else role.gpus_key)
    return f"lower {', '.join(keys[:-1])} or {keys[-1]}" if len(keys) > 1 else f"lower {keys[0]}"


def _rounded(amount: float) -> float:
    """As exact as Ray counts: 0.85 + 0.15 is 1."""
    return round(amount, 4)


def _amount(value: float) -> str:
    return f"{value:g}"


def _span(least: float, most: float) -> str:
    return _amount(least) if least == most else f"{_amount(least)} to {_amount(most)}"


# ---- show ----------------------------------------------------------------------------------------


def render_show(config: Config, device: Device) -> str:
    """The resolved config as YAML, then a table of the phases of `distillm-ray train`."""
    table = Table(title=f"asked of the cluster (device: {device})", title_justify="left")
    for name in ("phase", "role", "count", "CPUs each", "GPUs each", "CPUs", "GPUs", "set by"):
        left = name in ("phase", "role", "set by")
        table.add_column(name, justify="left" if left else "right")
    phases = train_phases(config, device)
    for phase in phases:
        for index, role in enumerate(phase.roles):
            table.add_row(
                phase.name if index == 0 else "",
                role.role,
                _span(role.count, role.most),
                _amount(role.cpus),
                _amount(role.gpus),
                _span(role.count * role.cpus, role.most * role.cpus),
                _span(role.count * role.gpus, role.most * role.gpus),
                ", ".join(role.keys(device)),
            )
        if len(phase.roles) > 1:
            most = [(role.most * role.cpus, role.most * role.gpus) for role in phase.roles]
            sums = (
                _span(phase.cpus, sum(cpus for cpus, _ in most)),
                _span(phase.gpus, sum(gpus for _, gpus in most)),
            )
            table.add_row("", "together", "", "", "", *sums, "")
        table.add_section()
    console = Console(width=130, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
        if any(phase.store_use.stores for phase in phases):
            limit = config.targets.max_bytes
            size = "what the run needs" if limit == "auto" else f"{limit / 2**30:.2f} GiB"
            console.print(
                f"object store: {size} for teacher targets (targets.max_bytes), and one copy of"
                " the published weights"
            )
        if config.targets.library is not None and config.loss.needs_teacher:
            size = config.targets.library_max_bytes / 2**30
            console.print(
                f"disk: at most {size:.2f} GiB of teacher targets in {config.targets.library}"
                " (targets.library, targets.library_max_bytes)",
                soft_wrap=True,
            )
        for role in phases[0].roles:
            if role.most > role.count:
                console.print(
                    f"{role.section}.actors: the run needs room for {role.count} and asks for up to"
                    f" {role.most} while the learners wait for them"
                )
        if config.is_colocated:
            console.print(
                "colocated (run.placement): one learner and one generator on each"
                f" {'GPU' if device == 'cuda' else 'CPU device'}, in turns; scorers have devices of"
                " their own",
                soft_wrap=True,
            )
        if config.mixes_teacher:
            console.print(
                "each generator holds the teacher beside the student (rollout.teacher_mix)"
            )
    return f"{dump_config(config)}\n{capture.get()}"
