"""`learner.offload`: keep the optimizer's state, and under ZeRO-3 the weights, off the GPU.

The optimizer's state stays torch's own, and torch's fused AdamW updates it on the CPU, so that
`cpu` compiles nothing. `nvme` needs DeepSpeed's async_io, which is compiled on first use.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from distillm_ray.config import LearnerConfig
from distillm_ray.errors import ConfigError
from distillm_ray.files import check_writable
from distillm_ray.types import Device


def offload_settings(config: LearnerConfig) -> dict[str, Any]:
    """The keys of DeepSpeed's `zero_optimization` for `learner.offload`; empty without."""
    if config.offload == "none":
        return {}
    settings: dict[str, Any] = {"offload_optimizer": {"device": config.offload}}
    if config.offload == "nvme":
        settings["offload_optimizer"]["nvme_path"] = str(config.offload_directory)
    if config.zero_stage == 3:
        # Main memory in both cases. DeepSpeed reads weights from disk through buffers whose size
        # would have to follow from the largest parameter, and they are an eighth of the state.
        settings["offload_param"] = {"device": "cpu"}
    return settings


def check_offload(config: LearnerConfig, device: Device) -> None:
    """Refuse an offload that does nothing on the learners' device.

    Raises:
        ConfigError: the learners run on CPUs.
    """
    if config.offload != "none" and device == "cpu":
        raise ConfigError(
            f"learner.offload must be none where learners run on CPUs, got {config.offload}: it"
            " moves state from a GPU to main memory or disk, and here it is in main memory already;"
            " set learner.offload=none"
        )


def check_async_io(directory: Path) -> None:
    """Build and load what `learner.offload: nvme` needs on this node.

    Raises:
        ConfigError: the directory cannot be written, or async_io cannot be built; with the reason.
    """
    check_writable(directory, "learner.offload_directory")
    if problem := async_io_problem(build=True):
        raise ConfigError(
            f"learner.offload: nvme needs DeepSpeed's async_io on every node with a learner, but"
            f" {problem}; or set learner.offload=cpu, which needs no compiler"
        )


def async_io_problem(*, build: bool) -> str:
    """Why DeepSpeed's async_io does not work on this node, and the remedy; empty if it does.

    Args:
        build: compile and load it, which takes a minute the first time.
    """
    # Takes seconds to import. The class is that of the accelerator at hand.
    from deepspeed.ops.op_builder import (  # noqa: PLC0415
        AsyncIOBuilder,  # pyright: ignore[reportAttributeAccessIssue]
    )

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        return "libaio or a C compiler is missing: install libaio-dev and build-essential"
    if build:
        try:
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"it does not build ({lines[0]}): install a C++ compiler and the CUDA toolkit"
    return ""
