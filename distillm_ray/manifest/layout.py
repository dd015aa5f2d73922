"""Which nodes a run needs: groups of equal nodes for the roles that `distillm-ray show` prints.

    pods        nodes that are cut out of machines: learners together, everybody else alone
    machines    whole machines: roles share one, unless a role needs more than one by itself

Each group carries a label, and its roles ask for it (`node_labels`): Ray would otherwise place a
learner where a larger generator has to fit, and wait forever. A run checks at its start that
everything fits, so all nodes are there then. Only the group of an elastic pool grows afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from distillm_ray.cluster import placement
from distillm_ray.cluster.placement import Available, Node, Phase, RoleSpec
from distillm_ray.config import Config
from distillm_ray.errors import ClusterError, ConfigError
from distillm_ray.types import Device

GIB = 2**30
LABEL = "distillm-ray"  # of nodes: the name of their group

TRANSIT_GIB = 16
"""Of the object store, for weights and batches: two versions of 2 billion parameters in float32."""
AUTO_TARGETS_GIB = 16
"""Of the object store, for target stores where `targets.max_bytes` is auto."""
SHM_MARGIN_GIB = 4
"""Of /dev/shm beyond the object store: NCCL and vLLM keep their own buffers there."""
HEAD_CPUS = 4
HEAD_MEMORY_GIB = 16  # beyond its object store


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What one machine of the cluster can give; by default what most with eight GPUs can."""

    gpus: int = 8
    cpus: int = 64
    memory_gib: int | None = None  # None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeGroup:
    """Equal nodes, and the roles whose processes run on them."""

    name: str
    roles: tuple[RoleSpec, ...]
    count: int
    most: int  # nodes, of an elastic pool that has asked for them; else `count`
    cpus: int  # per node
    gpus: int  # per node
    memory_gib: int | None  # per node; None: not known

    @property
    def grows(self) -> bool:
        """Whether an autoscaler adds and removes nodes."""
        return self.most > self.count

    @property
    def learns(self) -> bool:
        """Whether learners run here, whose checkpoint a shutdown waits for."""
        return any(role.section == "learner" for role in self.roles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The nodes of a run."""

    groups: tuple[NodeGroup, ...]
    store_gib: int  # object store of every node
    has_head: bool  # beside the groups; else the head is the first node of the first group

    @property
    def num_nodes(self) -> int:
        """Nodes of all groups, and the head."""
        return self.has_head + sum(group.count for group in self.groups)

    @property
    def most_nodes(self) -> int:
        """`num_nodes` when all elastic pools have grown."""
        return self.has_head + sum(group.most for group in self.groups)

    @property
    def store_bytes(self) -> int:
        """Object store of every node."""
        return self.store_gib * GIB

    @property
    def shm_gib(self) -> int:
        """/dev/shm of every node."""
        return self.store_gib + SHM_MARGIN_GIB

    def labels(self, group: NodeGroup) -> dict[str, str]:
        """Labels of a group's nodes; none where one group has all roles."""
        return {LABEL: group.name} if len(self.groups) > 1 else {}

    def overrides(self) -> list[str]:
        """What the run's command line adds to the config, so that roles find their nodes."""
        return [
            f"{role.section}.node_labels.{key}={value}"
            for group in self.groups
            for role in group.roles
            for key, value in self.labels(group).items()
        ]


def pods(config: Config, device: Device, machine: Machine, store_gib: int | None) -> Layout:
    """Nodes that are cut out of machines, and a head without any role's process.

    Learners share a node as far as a machine reaches, because they exchange gradients. A generator
    or scorer has a node of its own, so that its loss costs no other.

    Raises:
        ConfigError: a process needs a part of a GPU, or more than a machine has.
        ClusterError: a later phase does not fit on these nodes.
    """
    groups: list[NodeGroup] = []
    for role in _training(config, device).roles:
        if role.gpus != int(role.gpus):
            raise ConfigError(
                f"{role.gpus_key} must be a whole number where every role has nodes of its own, got"
                f" {role.gpus:g}: the rest of the GPU would be idle; set {role.section}.num_gpus=1,"
                " or share machines with --slurm, --skypilot or --ray-up"
            )
        most = _processes_per_machine(role, machine)
        if role.section != "learner":
            most = 1
        count = math.ceil(role.count / most)
        each = math.ceil(role.count / count)
        gpus = each * int(role.gpus)
        own_cpus = math.ceil(each * role.cpus)
        cpus = max(1, own_cpus, machine.cpus * gpus // machine.gpus if gpus else 0)
        share = gpus / machine.gpus if gpus else cpus / machine.cpus
        memory = None if machine.memory_gib is None else int(machine.memory_gib * share)
        groups.append(
            NodeGroup(
                name=role.role,
                roles=(role,),
                count=count,
                most=math.ceil(role.most / most),
                cpus=cpus,
                gpus=gpus,
                memory_gib=memory,
            )
        )
    return _checked(config, device, machine, groups, store_gib, has_head=True)


def machines(config: Config, device: Device, machine: Machine, store_gib: int | None) -> Layout:
    """Whole machines, of which the first is the head as well.

    A role that needs more than one machine has machines of its own, and so does an elastic pool,
    whose machines come and go; the others share machines, largest first. So whatever Ray places
    first, the rest fits.

    Raises:
        ConfigError: a process needs more than a machine has.
        ClusterError: a later phase does not fit on these machines.
    """
    shares: list[list[RoleSpec]] = []
    alone: list[RoleSpec] = []
    roles = _training(config, device).roles
    for role in sorted(roles, key=lambda role: role.count * role.gpus, reverse=True):
        if role.most > role.count or role.count > _processes_per_machine(role, machine):
            alone.append(role)
            continue
        home = next((share for share in shares if _fit([*share, role], machine)), None)
        if home is None:
            shares.append([role])
        else:
            home.append(role)
    parts = [*([role] for role in alone), *shares]
    parts = [sorted(part, key=roles.index) for part in parts]
    groups = [
        NodeGroup(
            name="-".join(role.role for role in part),
            roles=tuple(part),
            count=math.ceil(part[0].count / _processes_per_machine(part[0], machine)),
            most=math.ceil(part[0].most / _processes_per_machine(part[0], machine)),
            cpus=machine.cpus,
            gpus=machine.gpus if device == "cuda" else 0,
            memory_gib=machine.memory_gib,
        )
        for part in sorted(parts, key=lambda part: roles.index(part[0]))
    ]
    return _checked(config, device, machine, groups, store_gib, has_head=False)


def check_is_fixed(layout: Layout, format_name: str) -> None:
    """Refuse elastic pools where the number of machines cannot change.

    Raises:
        ConfigError: with the key of the first one.
    """
    for group in layout.groups:
        for role in group.roles:
            if role.most > role.count:
                raise ConfigError(
                    f"{role.section}.actors must be one number with --{format_name}, got"
                    f" {{min: {role.count}, max: {role.most}}}: such a job has as many machines at"
                    f" its end as at its start; set {role.section}.actors={role.most}, or use"
                    " --kuberay or --ray-up, whose clusters grow"
                )


def _training(config: Config, device: Device) -> Phase:
    if config.is_colocated:
        raise ConfigError(
            "run.placement must be separate for a manifest, got colocated: every role has nodes or"
            " whole GPUs of its own there; write the manifest with run.placement=separate, or"
            " choose the machines yourself (docs/clusters.md)"
        )
    phase = placement.train_phases(config, device)[0]
    for role in phase.roles:
        if role.node_labels:
            raise ConfigError(
                f"{role.labels_key} must be empty for a manifest, which labels its own nodes, got"
                f" {dict(role.node_labels)}: remove the key"
            )
    return phase


def _processes_per_machine(role: RoleSpec, machine: Machine) -> int:
    most = math.inf
    if role.gpus > 0:
        most = machine.gpus // role.gpus
    if role.cpus > 0:
        most = min(most, machine.cpus // role.cpus)
    if most < 1:
        above = ((role.gpus_key, role.gpus, machine.gpus), (role.cpus_key, role.cpus, machine.cpus))
        keys = " and ".join(key for key, asked, there in above if asked > there)
        raise ConfigError(
            f"a {role.role} needs {role.gpus:g} GPUs and {role.cpus:g} CPUs on one machine, which"
            f" has {machine.gpus} GPUs and {machine.cpus} CPUs (--node-gpus, --node-cpus); lower"
            f" {keys}"
        )
    return role.count if math.isinf(most) else int(most)


def _fit(roles: list[RoleSpec], machine: Machine) -> bool:
    gpus = sum(role.count * role.gpus for role in roles)
    cpus = sum(role.count * role.cpus for role in roles)
    return gpus <= machine.gpus and cpus <= machine.cpus


def _checked(
    config: Config,
    device: Device,
    machine: Machine,
    groups: list[NodeGroup],
    store_gib: int | None,
    *,
    has_head: bool,
) -> Layout:
    """The layout, if its nodes hold every phase, the target stores included."""
    phases = placement.train_phases(config, device)
    use = phases[0].store_use
    num_nodes = has_head + sum(group.count for group in groups)
    targets_gib = math.ceil(math.ceil(use.stores / num_nodes) * use.store_bytes / GIB)
    if use.stores and config.targets.max_bytes == "auto":
        targets_gib = AUTO_TARGETS_GIB
    if store_gib is None:
        store_gib = targets_gib + TRANSIT_GIB
    layout = Layout(groups=tuple(groups), store_gib=store_gib, has_head=has_head)
    for group in groups:
        if group.memory_gib is not None and group.memory_gib <= layout.shm_gib:
            raise ConfigError(
                f"a node with {group.gpus} GPUs and {group.cpus} CPUs has {group.memory_gib} GiB of"
                f" memory (its share of --node-memory-gib), and /dev/shm alone takes"
                f" {layout.shm_gib}: {store_gib} for the object store, of which targets.max_bytes"
                f" takes {targets_gib}; lower targets.max_bytes or --object-store-gib, or raise"
                " targets.stores"
            )
    nodes = [Node(cpus=0, object_store_bytes=layout.store_bytes)] * has_head
    labelled: list[RoleSpec] = []
    for group in groups:
        labels = layout.labels(group)
        node = Node(
            cpus=group.cpus,
            gpus=group.gpus,
            object_store_bytes=layout.store_bytes,
            labels=labels,
        )
        nodes += [node] * group.count
        labelled += [dataclasses.replace(role, node_labels=labels) for role in group.roles]
    training = dataclasses.replace(phases[0], roles=tuple(labelled))
    try:
        placement.check([training, *phases[1:]], Available(nodes=tuple(nodes)))
    except ClusterError as error:
        raise ClusterError(
            f"{error}\nThese are the nodes of the manifest, for machines of {machine.gpus} GPUs and"
            f" {machine.cpus} CPUs (--node-gpus, --node-cpus), with object stores of {store_gib}"
            " GiB (--object-store-gib)"
        ) from error
    return layout
