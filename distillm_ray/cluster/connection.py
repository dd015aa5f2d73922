"""Join or start the Ray cluster of a job, and read what it offers."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

import psutil
import ray

from distillm_ray.cache_directory import CACHE_VARIABLE, cache_directory
from distillm_ray.cluster.address import knock
from distillm_ray.cluster.placement import Available, Node
from distillm_ray.config import Config
from distillm_ray.errors import ClusterError
from distillm_ray.remote.store import PLACE_VARIABLES
from distillm_ray.types import Device


def connect(
    config: Config,
    *,
    weights_bytes: int = 0,
    metrics_port: int | None = None,
    namespace: str = "distillm-ray",
) -> None:
    """Join the cluster at RAY_ADDRESS, which a Ray job sets, or start one on this machine.

    Args:
        weights_bytes: in transit during the run; sizes the object store of a new cluster.
        metrics_port: at which a new cluster serves metrics; None: it serves none.

    Raises:
        ClusterError: the cluster cannot be reached or started.
    """
    environment = {
        # By default Ray notices a dead or hanging worker after minutes.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "120",
        "RAY_TRAIN_V2_ENABLED": "1",
        # A process that tells learners what the driver tells them (preemption.py).
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    environment = {name: os.environ.setdefault(name, value) for name, value in environment.items()}
    # All processes of a job find an object store, and what was fetched, at the same place. Its
    # credentials are not handed on: Ray shows the runtime environment to whoever asks.
    environment[CACHE_VARIABLE] = str(cache_directory())
    environment |= {name: os.environ[name] for name in PLACE_VARIABLES if name in os.environ}
    # Ray refuses a variable that the job's runtime environment sets too, even to the same value.
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
    settings: dict[str, Any] = {}
    if not os.environ.get("RAY_ADDRESS"):
        # A cluster of this process alone: no authentication, no dashboard, no report to Ray's
        # authors of what it is used for.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings = {
            # Without an address Ray would join the cluster that was started here last.
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": _local_store_bytes(config, weights_bytes),
            # By default, Ray serves metrics on all interfaces.
            "_system_config": {"enable_metrics_collection": metrics_port is not None},
            "_metrics_export_port": metrics_port,
        }
    try:
        knock(os.environ.get("RAY_ADDRESS", ""))
        ray.init(
            namespace=namespace,
            runtime_env={"env_vars": environment},
            log_to_driver=False,
            logging_level=logging.ERROR,
            **settings,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ClusterError(
            f"Ray did not start or could not be reached (RAY_ADDRESS ="
            f" {os.environ.get('RAY_ADDRESS', 'not set')}): {error}"
        ) from error


def available() -> Available:
    """What the connected cluster offers."""
    nodes = [(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
    return Available(
        nodes=tuple(
            Node(
                cpus=resources.get("CPU", 0),
                gpus=resources.get("GPU", 0),
                object_store_bytes=int(resources.get("object_store_memory", 0)),
                labels=labels,
            )
            for resources, labels in nodes
        )
    )


def resolve_device(config: Config) -> Device:
    """`auto` is CUDA where the cluster has a GPU."""
    if config.run.device != "auto":
        return config.run.device
    return "cuda" if available().gpus > 0 else "cpu"


def is_free(port: int) -> bool:
    """Whether a process on this machine can listen on a port, on all interfaces."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
        return True


def _local_store_bytes(config: Config, weights_bytes: int) -> int:
    """Room for all targets, the weights and the batches in transit.

    With `targets.max_bytes: auto` it is 30 % of the free memory, Ray's own choice, or more if the
    weights need it.
    """
    transit = weights_bytes + 2 * 2**30
    if config.targets.max_bytes == "auto":
        return max(psutil.virtual_memory().available * 3 // 10, 2 * transit)
    return config.targets.limit + transit
