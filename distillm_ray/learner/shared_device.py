"""What a learner does before a generator takes over the device that they share."""

from __future__ import annotations

import torch

from distillm_ray.errors import ConfigError

_GIB = 2**30


def leave_room(device: torch.device, part: float) -> None:
    """Free the memory that no tensor needs, and check that the rest is this process's part.

    On a CPU there is nothing to do.

    Raises:
        ConfigError: it keeps more than `part` (`learner.num_gpus`) of the GPU's memory.
    """
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    check_kept(
        kept_bytes=torch.cuda.memory_reserved(device),
        total_bytes=torch.cuda.get_device_properties(device).total_memory,
        part=part,
    )


def check_kept(*, kept_bytes: int, total_bytes: int, part: float) -> None:
    """Refuse to keep more than a part of the memory.

    Raises:
        ConfigError: with the part that would be enough.
    """
    if kept_bytes <= part * total_bytes:
        return
    needed = kept_bytes / total_bytes
    raise ConfigError(
        f"a learner must keep at most learner.num_gpus = {part:g} of its GPU's memory while vLLM"
        f" works, got {needed:.2f} ({kept_bytes / _GIB:.1f} of {total_bytes / _GIB:.1f} GiB): vLLM"
        " would not get its memory back; lower rollout.engine.gpu_memory_utilization below"
        f" {1 - needed:.2f}, set learner.offload=cpu, use more GPUs (learner.workers and"
        " rollout.actors) with learner.zero_stage=3, or set run.placement=separate"
    )
