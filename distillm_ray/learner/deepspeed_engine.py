"""How the learner uses DeepSpeed: process group, settings and random state."""

from __future__ import annotations

import os
import random
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from distillm_ray.config import LearnerConfig
from distillm_ray.learner.offload import offload_settings

_BUCKET_ELEMENTS = 50_000_000  # size of a communication buffer: 200 MB in float32


def join_group(device: torch.device) -> None:
    """Make DeepSpeed use the existing process group, or a new group of this process only."""
    accelerator = get_accelerator()
    assert accelerator is not None
    chosen = accelerator.device_name()
    assert chosen.startswith(device.type), (
        f"DeepSpeed chose {chosen} for a learner on {device}; set DS_ACCELERATOR before it starts"
    )
    if device.type == "cpu":
        # Otherwise DeepSpeed compiles a C++ extension for its shared-memory all-reduce.
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed reads it, also on CPUs
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        alone = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def engine_config(
    config: LearnerConfig, dtype: torch.dtype, *, persistence_threshold: int
) -> dict[str, Any]:
    """DeepSpeed's settings: `step()` ends the accumulation, and gradients are summed in float32."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # At stage 0 the learner clips in a hook, because it needs the norm.
        "gradient_clipping": config.max_gradient_norm if config.zero_stage > 0 else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": _BUCKET_ELEMENTS,
            "allgather_bucket_size": _BUCKET_ELEMENTS,
            "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
            "stage3_param_persistence_threshold": persistence_threshold,
            **offload_settings(config),
        },
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW is fused on the CPU as well
        "bf16": {"enabled": dtype == torch.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def reduces_by_copying(zero_stage: int, dtype: torch.dtype) -> bool:
    """Whether DeepSpeed all-reduces gradients in a flat copy, which it then copies back.

    A rank alone has nothing to reduce and can leave that out. The other optimizers of ZeRO move the
    gradients into their partitions in the same call, so that it cannot be left out there.
    """
    return zero_stage == 0 or (zero_stage == 1 and dtype == torch.bfloat16)


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator that dropout or a library may use."""
    state = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_state`. A GPU's state is set only if the saved run had one."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
