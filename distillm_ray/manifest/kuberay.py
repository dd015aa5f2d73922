"""A RayJob for the KubeRay operator: a cluster that lives as long as the run."""

from __future__ import annotations

from typing import Any

from distillm_ray.manifest.job import RETRIES, SHARED, STOP_S, Job, check_shells
from distillm_ray.manifest.layout import (
    HEAD_CPUS,
    HEAD_MEMORY_GIB,
    Layout,
    NodeGroup,
)
from distillm_ray.manifest.text import PORT, heading, to_yaml

TOKEN_SECRET = "distillm-ray-token"
"""A Kubernetes secret whose key `auth_token` is the cluster's token."""
SHARED_CLAIM = "distillm-ray"
"""A claim of a volume that many nodes can write (ReadWriteMany)."""
USER = 1000  # of deploy/Dockerfile

_HOLD_FOR_DRIVER = (
    'pkill -TERM -f "bin/[d]istillm-ray train";'
    ' while pgrep -f "bin/[d]istillm-ray train" > /dev/null; do sleep 1; done'
)
# Ray drains a node whose `ray start` gets SIGTERM, which the run answers by a checkpoint.
_DRAIN_FOR_LEARNERS = (
    'pkill -TERM -f "[r]ay start"; while pgrep -f "[r]ay::RayTrainWorker" > /dev/null;'
    " do sleep 1; done"
)


def kuberay(job: Job, layout: Layout, image: str) -> str:
    """The document.

    A pod that is shut down first runs its `preStop` command, within its grace period: the head's
    asks the driver to stop, a learner's tells Ray that the node will go, and both wait for the
    checkpoint. A retried RayJob makes a new cluster,
    whose driver finds the checkpoint in the run directory.

    Raises:
        ConfigError: an override does not survive the shells on its way.
    """
    check_shells(job.command)
    store = {"object-store-memory": str(layout.store_bytes)}
    memory = layout.shm_gib + HEAD_MEMORY_GIB
    grows = any(group.grows for group in layout.groups)
    knows_memory = all(group.memory_gib is not None for group in layout.groups)
    head = _resources(HEAD_CPUS, 0, memory if knows_memory else None)
    document = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job.name},
        "spec": {
            "entrypoint": job.in_shared_directory,
            "submissionMode": "K8sJobMode",
            "runtimeEnvYAML": f'env_vars:\n  RAY_JOB_STOP_WAIT_TIME_S: "{STOP_S}"\n',
            "backoffLimit": RETRIES,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 60,
            "rayClusterSpec": {
                "rayVersion": job.ray_version,
                "authOptions": {"mode": "token", "secretName": TOKEN_SECRET},
                "enableInTreeAutoscaling": grows,
                # The first version reads no labels of nodes.
                **({"autoscalerOptions": {"version": "v2"}} if grows else {}),
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", **store},
                    "template": _pod(
                        layout, image, "ray-head", head, _HOLD_FOR_DRIVER, asks_kubernetes=grows
                    ),
                },
                "workerGroupSpecs": [
                    _group(layout, group, image, store) for group in layout.groups
                ],
            },
        },
    }
    lines = (
        "",
        f"    kubectl create secret generic {TOKEN_SECRET} --from-literal=auth_token=...   # once",
        "    kubectl apply -f THIS_FILE",
        f"    kubectl logs -f job/{job.name}",
        f"    kubectl delete rayjob {job.name}     # stops it with a checkpoint",
        "",
        f"It mounts the claim {SHARED_CLAIM} at {SHARED}. All steps: deploy/README.md.",
    )
    return heading(job, *lines) + to_yaml(document)


def _group(layout: Layout, group: NodeGroup, image: str, store: dict[str, str]) -> dict[str, Any]:
    labels = layout.labels(group)
    hold = _DRAIN_FOR_LEARNERS if group.learns else None
    resources = _resources(group.cpus, group.gpus, group.memory_gib)
    return {
        "groupName": group.name,
        "replicas": group.count,
        "minReplicas": group.count,
        "maxReplicas": group.most,
        **({"labels": labels} if labels else {}),
        "rayStartParams": store,
        "template": _pod(layout, image, "ray-worker", resources, hold),
    }


def _pod(
    layout: Layout,
    image: str,
    name: str,
    resources: dict[str, Any],
    hold: str | None,
    *,
    asks_kubernetes: bool = False,
) -> dict[str, Any]:
    """The template of a pod.

    Args:
        hold: a command that a shutdown waits for.
        asks_kubernetes: the autoscaler beside the head needs the token of a service account.
    """
    container: dict[str, Any] = {"name": name, "image": image, "resources": resources}
    if name == "ray-head":
        container["ports"] = [
            {"containerPort": PORT, "name": "gcs-server"},
            {"containerPort": 8265, "name": "dashboard"},
        ]
    container["env"] = [{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": str(STOP_S)}]
    container["securityContext"] = {"allowPrivilegeEscalation": False}
    container["volumeMounts"] = [
        {"name": "shared-mem", "mountPath": "/dev/shm"},
        {"name": "shared", "mountPath": str(SHARED)},
    ]
    if hold is not None:
        command = ["/bin/bash", "-c", hold]
        container["lifecycle"] = {"preStop": {"exec": {"command": command}}}
    return {
        "spec": {
            "terminationGracePeriodSeconds": STOP_S + 60,
            "automountServiceAccountToken": asks_kubernetes,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
            },
            "containers": [container],
            "volumes": [
                {
                    "name": "shared-mem",
                    "emptyDir": {"medium": "Memory", "sizeLimit": f"{layout.shm_gib}Gi"},
                },
                {"name": "shared", "persistentVolumeClaim": {"claimName": SHARED_CLAIM}},
            ],
        }
    }


def _resources(cpus: int, gpus: int, memory_gib: int | None) -> dict[str, Any]:
    amounts: dict[str, str] = {"cpu": str(cpus)}
    if memory_gib is not None:
        amounts["memory"] = f"{memory_gib}Gi"
    if gpus:
        amounts["nvidia.com/gpu"] = str(gpus)
    return {"requests": amounts, "limits": amounts}
