"""Refuses quantized model directories that cannot be loaded, or not be trained, before a run."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from distillm_ray.errors import ModelError

# What transformers 5.19 imports to load each method's checkpoints. A module has the package's name.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "aqlm": ("aqlm",),
    "auto-round": ("auto_round",),
    "awq": ("gptqmodel",),
    "bitnet": (),
    "bitsandbytes": ("bitsandbytes",),
    "compressed-tensors": ("compressed_tensors",),
    "eetq": ("eetq",),
    "fbgemm_fp8": ("fbgemm_gpu",),
    "fp8": (),
    "fp_quant": ("fp_quant",),
    "gptq": ("optimum", "gptqmodel"),
    "higgs": ("flute",),
    "hqq": ("hqq",),
    "mxfp4": (),
    "mxfp8": (),
    "quanto": ("optimum",),
    "quark": ("quark",),
    "spqr": ("spqr_quant",),
    "torchao": ("torchao",),
    "vptq": ("vptq",),
}


def check_quantization(
    config: Mapping[str, Any], path: Path, *, key: str, use: Literal["train", "run"]
) -> None:
    """Check that transformers can load the weights of `path` for this use.

    Args:
        config: of the model, `config.json`.
        key: the config key or option that names the directory.

    Raises:
        ModelError: the weights are quantized, and are to be trained or need a missing package.
    """
    settings = config.get("quantization_config")
    if not isinstance(settings, Mapping):
        return
    method = str(settings.get("quant_method", "bitsandbytes"))
    if use == "train":
        raise ModelError(
            f"{key}: the weights of {path} are quantized ({method}), which cannot be trained; name"
            " the unquantized checkpoint"
        )
    if method not in PACKAGES:
        raise ModelError(
            f"{key}: {path} is quantized by {method!r}, which transformers cannot load (known:"
            f" {', '.join(sorted(PACKAGES))}); name the unquantized checkpoint"
        )
    missing = [name for name in PACKAGES[method] if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{key}: {path} is quantized by {method}; loading it needs"
            f" {' and '.join(missing)}, not installed here: install"
            f" {'them' if len(missing) > 1 else 'it'} on every node that loads the model, or name"
            " the unquantized checkpoint"
        )
