"""Output heads: from hidden states to logits.

The learner holds a frozen copy of the teacher's head, so that the scorers need to send only hidden
states.

Axes: N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from distillm_ray.errors import ModelError
from distillm_ray.models.logit_rules import LogitRule, logit_rule

PLAIN_RULE = LogitRule()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FrozenHead:
    """A head without gradient and without the rows beyond the tokenizer's vocabulary."""

    weight_VD: Tensor
    bias_V: Tensor | None = None
    rule: LogitRule = PLAIN_RULE

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Compute the product in the weight's dtype and the rest in float32 (float64 stays)."""
        products_NV = hidden_ND.to(self.weight_VD.dtype) @ self.weight_VD.T
        return finish_logits(products_NV, self.bias_V, self.rule)

    def to(self, device: torch.device | str) -> FrozenHead:
        """Return the same head on `device`."""
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return FrozenHead(weight_VD=self.weight_VD.to(device), bias_V=bias_V, rule=self.rule)


def finish_logits(products_NV: Tensor, bias_V: Tensor | None, rule: LogitRule) -> Tensor:
    """Turn matrix products into float32 logits (float64 stays): bias, scale, soft cap."""
    logits_NV = products_NV if products_NV.dtype == torch.float64 else products_NV.float()
    if bias_V is not None:
        logits_NV = logits_NV + bias_V.to(logits_NV.dtype)
    if rule.scale != 1.0:
        logits_NV = logits_NV * rule.scale
    if rule.soft_cap is not None:
        logits_NV = torch.tanh(logits_NV / rule.soft_cap) * rule.soft_cap
    return logits_NV


def gradient_of_products(gradient_NV: Tensor, logits_NV: Tensor, rule: LogitRule) -> Tensor:
    """Return the gradient of `finish_logits` for its products (and bias), given its logits'."""
    if rule.soft_cap is not None:
        gradient_NV = gradient_NV * (1 - (logits_NV / rule.soft_cap) ** 2)
    if rule.scale != 1.0:
        gradient_NV = gradient_NV * rule.scale
    return gradient_NV


def load_frozen_head(
    directory: Path,
    *,
    vocabulary_size: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> FrozenHead:
    """Read the output head of the teacher's checkpoint: one tensor, tied or not, and its bias.

    `vocabulary_size` is the tokenizer's: rows beyond it are padding and are cut off. `dtype` None
    keeps the checkpoint's. Only safetensors are read. The model is built on the meta device, to
    find the head's tensor by its name.

    Raises:
        ModelError: no safetensors, no such tensor, fewer rows than the vocabulary, or an unknown
            head rule.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    rule = logit_rule(config.to_dict())
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = skeleton.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ModelError(
            f"teacher.model: the output head of {directory} must be a linear layer, got a"
            f" {type(head).__name__}: the learner cannot compute logits from hidden states; use"
            " another model"
        )
    files = _files_by_tensor(directory)
    prefix = f"{skeleton.base_model_prefix}."
    parameters = dict(skeleton.named_parameters(remove_duplicate=False))

    def read(wanted: Tensor) -> Tensor:
        names = [name for name, parameter in parameters.items() if parameter is wanted]
        # transformers may rename tensors when it loads them: GPT-NeoX's head is embed_out in files.
        names += revert_weight_conversion(skeleton, dict.fromkeys(names, wanted))
        # Checkpoints saved from the bare backbone (GPT-2's) have names without its prefix.
        names += [name.removeprefix(prefix) for name in names]
        for name in names:
            if name in files:
                with safe_open(files[name], framework="pt") as file:
                    tensor = file.get_slice(name)[:vocabulary_size]
                return tensor.to(device=device, dtype=dtype or tensor.dtype)
        raise ModelError(
            f"teacher.model: {directory} has no tensor named"
            f" {' or '.join(dict.fromkeys(names))}: the learner needs the output head to turn"
            " hidden states into distributions"
        )

    weight_VD = read(head.weight)
    if weight_VD.shape[0] < vocabulary_size:
        raise ModelError(
            f"teacher.model: the output head of {directory} has {weight_VD.shape[0]} rows, the"
            f" tokenizer has {vocabulary_size} ids: some ids would have no teacher probability"
        )
    bias_V = None if head.bias is None else read(head.bias)
    return FrozenHead(weight_VD=weight_VD, bias_V=bias_V, rule=rule)


def _files_by_tensor(directory: Path) -> dict[str, Path]:
    """Map each tensor name to the safetensors file that holds it."""
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: directory / file for name, file in names.items()}
    single = directory / "model.safetensors"
    if not single.exists():
        raise ModelError(
            f"teacher.model: {directory} has neither model.safetensors nor"
            " model.safetensors.index.json: other formats can run code when they are read and are"
            " not loaded"
        )
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)
