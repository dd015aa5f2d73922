"""A cluster file for `ray up`, on AWS: virtual machines that run the image."""

from __future__ import annotations

from typing import Any

from distillm_ray.manifest.job import SHARED, STOP_S, Job, check_shells
from distillm_ray.manifest.layout import Layout, NodeGroup
from distillm_ray.manifest.text import PORT, heading, ray_start, to_yaml

DISK_GIB = 500  # of a machine: the image, and targets that Ray spills
TOKEN_FILE = "~/.ray/auth_token"  # where Ray looks for it, and `ray get-auth-token` writes it


def ray_up(job: Job, layout: Layout, image: str, machine_type: str) -> str:
    """The document. The cluster runs no job by itself; its heading says how to submit the run.

    Raises:
        ConfigError: an override does not survive the shells on its way.
    """
    check_shells(job.command)
    first, *others = layout.groups
    workers = {group.name: (group, group.count, group.most) for group in others}
    if first.most > 1:
        workers[first.name] = (first, first.count - 1, first.most - 1)
    limits = "ulimit -n 65536; "
    head = ("--head", f"--port={PORT}", "--autoscaling-config=~/ray_bootstrap_config.yaml")
    document = {
        "cluster_name": job.name,
        "max_workers": layout.most_nodes - 1,
        "idle_timeout_minutes": 60,
        "provider": {"type": "aws", "region": "us-west-2", "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": image,
            "container_name": "distillm_ray",
            "pull_before_run": True,
            "run_options": [
                f"--shm-size={layout.shm_gib}g",
                "--ulimit=nofile=65536:65536",
                "--env=RAY_AUTH_MODE=token",
                f"--volume={SHARED}:{SHARED}",
            ],
        },
        "file_mounts": {TOKEN_FILE: TOKEN_FILE},
        # On the machine itself, before the image is there.
        "initialization_commands": [
            f"mountpoint -q {SHARED} || {{ echo 'mount the shared file system at {SHARED} here,"
            " see deploy/README.md' >&2; exit 1; }"
        ],
        # Else Ray's own would install packages into the image.
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_node_type": "head",
        "available_node_types": {
            "head": _node_type(layout, first, 0, 0, machine_type),
            **{
                name: _node_type(layout, group, count, most, machine_type)
                for name, (group, count, most) in workers.items()
            },
        },
        "head_start_ray_commands": ["ray stop", limits + ray_start(layout, None, *head)],
        "worker_start_ray_commands": [
            "ray stop",
            limits + ray_start(layout, None, f"--address=$RAY_HEAD_IP:{PORT}"),
        ],
    }
    runtime = f'{{"env_vars": {{"RAY_JOB_STOP_WAIT_TIME_S": "{STOP_S}"}}}}'
    lines = (
        "",
        "    ray get-auth-token --generate          # once",
        "    ray up THIS_FILE",
        "    ray dashboard THIS_FILE                # forwards port 8265; leave it running",
        "    export RAY_AUTH_MODE=token RAY_ADDRESS=http://127.0.0.1:8265",
        f"    ray job submit --submission-id {job.name}-1 --runtime-env-json '{runtime}' \\",
        f"      -- {job.in_shared_directory}",
        f"    ray job stop {job.name}-1          # stops it with a checkpoint",
        "    ray down THIS_FILE",
        "",
        f"Every machine mounts the shared file system at {SHARED}. All steps: deploy/README.md.",
    )
    return heading(job, *lines) + to_yaml(document)


def _node_type(
    layout: Layout, group: NodeGroup, count: int, most: int, machine_type: str
) -> dict[str, Any]:
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": DISK_GIB, "VolumeType": "gp3"}}
    labels = layout.labels(group)
    return {
        "resources": {"CPU": group.cpus, "GPU": group.gpus},
        **({"labels": labels} if labels else {}),
        "min_workers": count,
        "max_workers": most,
        "node_config": {"InstanceType": machine_type, "BlockDeviceMappings": [disk]},
    }
