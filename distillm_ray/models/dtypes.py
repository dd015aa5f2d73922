"""From the config's dtype to torch's."""

from __future__ import annotations

import torch

from distillm_ray.config import Dtype


def resolve_dtype(dtype: Dtype, device: torch.device | str) -> torch.dtype:
    """Resolve `auto`: bfloat16 where the device multiplies it natively, else float32."""
    if dtype != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32
