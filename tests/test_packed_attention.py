"""Attention over packed rows equals each sequence alone and the mask of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from distillm_ray.models.packed import packed_forward
from distillm_ray.models.packed_attention import (
    PACKED_SDPA,
    attend_sequence_by_sequence,
    packed_arguments,
)

LENGTHS = (5, 1, 9, 3)
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    match architecture:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
        case "sliding window":
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
        case _:
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=32)
            )
    model.set_attn_implementation("sdpa")
    model.eval()
    return model


def row() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    token_ids_L = torch.randint(50, (sum(LENGTHS),), generator=generator)
    return token_ids_L, torch.cat([torch.arange(length) for length in LENGTHS])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "sliding window"])
def test_a_packed_row_equals_each_sequence_alone_in_values_and_gradients(architecture: str) -> None:
    token_ids_L, position_ids_L = row()
    weights_LD = torch.randn(len(token_ids_L), 32, generator=torch.Generator().manual_seed(2))
    results = []
    for packed in (True, False):
        model = make(architecture)
        if packed:
            attend_sequence_by_sequence(model)
            assert model.config._attn_implementation == PACKED_SDPA
            hidden_LD = packed_forward(model.base_model, token_ids_L, position_ids_L)
        else:
            pairs = zip(token_ids_L.split(LENGTHS), position_ids_L.split(LENGTHS), strict=True)
            hidden_LD = torch.cat(
                [packed_forward(model.base_model, ids, positions) for ids, positions in pairs]
            )
        (hidden_LD * weights_LD).sum().backward()
        gradients = [item.grad for item in model.parameters() if item.grad is not None]
        results.append((hidden_LD.detach(), gradients))
    (packed_LD, packed_gradients), (alone_LD, alone_gradients) = results
    torch.testing.assert_close(packed_LD, alone_LD, rtol=0, atol=2e-6)
    assert len(packed_gradients) == len(alone_gradients) > 10
    for ours, theirs in zip(packed_gradients, alone_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "sliding window"])
def test_a_packed_row_equals_the_same_row_under_the_mask_of_transformers(architecture: str) -> None:
    token_ids_L, position_ids_L = row()
    masked, packed = make(architecture), make(architecture)
    attend_sequence_by_sequence(packed)
    with torch.no_grad():
        expected_LD = packed_forward(masked.base_model, token_ids_L, position_ids_L)
        found_LD = packed_forward(packed.base_model, token_ids_L, position_ids_L)
    torch.testing.assert_close(found_LD, expected_LD, rtol=0, atol=2e-6)


def test_a_row_without_boundaries_is_one_sequence() -> None:
    token_ids_L, _ = row()
    masked, packed = make("llama"), make("llama")
    attend_sequence_by_sequence(packed)
    with torch.no_grad():
        expected_LV = masked(token_ids_L[None], use_cache=False).logits[0]
        found_LV = packed(token_ids_L[None], use_cache=False).logits[0]
    torch.testing.assert_close(found_LV, expected_LV, rtol=0, atol=2e-6)


def test_a_model_whose_attention_cannot_be_replaced_keeps_its_mask() -> None:
    model = make("llama")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    attend_sequence_by_sequence(model)
    assert model.config._attn_implementation == "sdpa"
    assert packed_arguments(model, torch.arange(3)) == {}
