"""How manifests are written: YAML with a heading, and what scripts have in common."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import yaml

from distillm_ray.manifest.job import Job
from distillm_ray.manifest.layout import Layout, NodeGroup

PORT = 6379
"""Of the cluster's control process on the head; Ray's default."""


def heading(job: Job, *lines: str) -> str:
    """Comments that say where the file comes from and what to do with it."""
    origin = f"Written by: {job.written_by}"
    return "".join(f"# {line}".rstrip() + "\n" for line in (origin, *lines))


def to_yaml(document: dict[str, Any]) -> str:
    """The document in the order of its keys; texts of several lines as they are."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10_000)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks, and repeats values instead of pointing to them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def ray_start(layout: Layout, group: NodeGroup | None, *options: str) -> str:
    """The command that starts a node; options are written as they are, for a shell to expand.

    `group`: whose labels the node has. None: something else tells Ray.
    """
    found = {} if group is None else layout.labels(group)
    labels = ",".join(f"{key}={value}" for key, value in found.items())
    size = f"--object-store-memory={layout.store_bytes}"
    parts = ["ray start", *options, size, *([f"--labels={labels}"] if labels else [])]
    return " ".join((*parts, "--disable-usage-stats"))


def groups_by_node(layout: Layout) -> list[NodeGroup]:
    """The group of each node, in order."""
    return [group for group in layout.groups for _ in range(group.count)]


def wait_for_nodes(layout: Layout) -> list[str]:
    """Lines of a script that waits until all nodes have joined the cluster at RAY_ADDRESS."""
    return [
        "timeout 900 python - <<'END'",
        "import time",
        "import ray",
        "ray.init(log_to_driver=False)",
        f'while sum(node["Alive"] for node in ray.nodes()) < {layout.num_nodes}:',
        "    time.sleep(2)",
        "END",
    ]


def block(lines: Sequence[str]) -> str:
    """Lines as one text."""
    return "\n".join(lines) + "\n"


def driver(job: Job) -> list[str]:
    """Lines of a script that runs the driver in the background and waits for it.

    `stopped` becomes `time` by SIGTERM and `user` by SIGINT, and `code` the driver's exit code.
    """
    return [
        "stopped=",
        f"{shlex.join(job.command)} &",
        "driver=$!",
        "trap 'stopped=time; kill -TERM \"$driver\" || true' TERM",
        "trap 'stopped=user; kill -TERM \"$driver\" || true' INT",
        "code=0",
        'wait "$driver" || code=$?',
        'if [ -n "$stopped" ]; then  # the signal has ended the first wait',
        "  code=0",
        '  wait "$driver" || code=$?',
        "fi",
    ]
