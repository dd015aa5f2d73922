"""What every benchmark writes beside its numbers, and how several things are timed side by side."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
REPOSITORY = Path(__file__).parent.parent


def provenance() -> dict[str, Any]:
    """Machine, commit and command: what a number is worth nothing without."""
    return {
        "machine": machine(),
        "commit": commit(),
        "command": " ".join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def machine() -> dict[str, Any]:
    """Processor, accelerator and versions."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if "model name" in line), model
        )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_average_at_start": os.getloadavg()[0],
    }


@functools.cache
def commit() -> str:
    """The commit the numbers are from; `-dirty` where tracked files differed when first asked.

    A script that writes two files asks once: its first file is such a difference.
    """
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
    except subprocess.CalledProcessError:
        return "none"


def alternate(
    functions: Mapping[str, Callable[[], Any]], repetitions: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each function: one call of each to warm up, then round after round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            synchronize(device)
            started = time.perf_counter()
            function()
            synchronize(device)
            if repetition > 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median(values: list[float]) -> float:
    """Of the repetitions."""
    return statistics.median(values)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write(name: str, result: Mapping[str, Any]) -> Path:
    """Write `results/<name>.json` with the provenance in front."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**provenance(), **result}, indent=1) + "\n")
    return path
