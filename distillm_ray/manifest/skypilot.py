"""A task for SkyPilot: Ray on equal machines of any cloud or Kubernetes cluster."""

from __future__ import annotations

from typing import Any

from distillm_ray.manifest.job import RETRIES, SHARED, STOPPED, Job
from distillm_ray.manifest.layout import Layout
from distillm_ray.manifest.text import (
    PORT,
    block,
    driver,
    groups_by_node,
    heading,
    ray_start,
    to_yaml,
    wait_for_nodes,
)

SHARED_VOLUME = "distillm-ray"
"""A SkyPilot volume that all machines can write."""


def skypilot(job: Job, layout: Layout, image: str, machine_type: str | None) -> str:
    """The document. `machine_type`: the accelerator; None on machines without.

    Every machine runs the same script. A managed job that stopped or was preempted starts again on
    new machines, and resumes from the run directory on the volume.
    """
    first = layout.groups[0]
    resources: dict[str, Any] = {}
    if first.gpus:
        resources["accelerators"] = f"{machine_type}:{first.gpus}"
    resources["cpus"] = f"{first.cpus}+"
    if first.memory_gib is not None:
        resources["memory"] = f"{first.memory_gib}+"
    resources["image_id"] = f"docker:{image}"
    resources["job_recovery"] = {
        "max_restarts_on_errors": RETRIES,
        "recover_on_exit_codes": [STOPPED],
    }
    document = {
        "name": job.name,
        "num_nodes": layout.num_nodes,
        "resources": resources,
        "volumes": {str(SHARED): SHARED_VOLUME},
        "envs": {"RAY_AUTH_MODE": "token"},
        "secrets": {"RAY_AUTH_TOKEN": None},  # null: must be given at the launch
        "run": block(_script(job, layout)),
    }
    lines = (
        "",
        "    export RAY_AUTH_TOKEN=...           # any secret, as from `openssl rand -hex 32`",
        "    sky jobs launch --secret RAY_AUTH_TOKEN THIS_FILE",
        f"    sky jobs logs --name {job.name}",
        f"    sky jobs cancel --name {job.name}",
        "",
        f"It mounts the volume {SHARED_VOLUME} at {SHARED}. All steps: deploy/README.md.",
    )
    return heading(job, *lines) + to_yaml(document)


def _script(job: Job, layout: Layout) -> list[str]:
    nodes = groups_by_node(layout)
    join = '--address="$RAY_ADDRESS"'
    head = ("--head", '--node-ip-address="$head_ip"', f"--port={PORT}", "--block")
    script = [
        "set -euo pipefail",
        f"cd {SHARED}",
        'head_ip=$(echo "$SKYPILOT_NODE_IPS" | head -n1)',
        f'export RAY_ADDRESS="$head_ip:{PORT}"',
        'is_up() { ray health-check --address "$RAY_ADDRESS" > /dev/null 2>&1; }',
    ]
    if len(nodes) > 1:
        script += [
            'if [ "$SKYPILOT_NODE_RANK" -gt 0 ]; then',
            "  until is_up; do sleep 2; done",
            '  case "$SKYPILOT_NODE_RANK" in',
            *(
                f"    {rank}) {ray_start(layout, nodes[rank], join)} ;;"
                for rank in range(1, len(nodes))
            ),
            "  esac",
            "  failures=0  # the run ends with its head",
            '  while [ "$failures" -lt 6 ]; do',
            "    if is_up; then failures=0; else failures=$((failures + 1)); fi",
            "    sleep 10",
            "  done",
            "  exit 0",
            "fi",
        ]
    script += [
        f"{ray_start(layout, nodes[0], *head)} &",
        "cluster=$!",
        "trap 'kill \"$cluster\" 2> /dev/null || true' EXIT",
        "until is_up; do sleep 2; done",
        *(wait_for_nodes(layout) if len(nodes) > 1 else ()),
        *driver(job),
        'exit "$code"',
    ]
    return script
