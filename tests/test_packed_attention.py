"""Attention over packed rows equals each sequence alone and the eager attention of transformers.

Axes: L packed tokens, D hidden size, H heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from distillm_ray.models import packed_attention
from distillm_ray.models.packed_attention import (
    BY_SEQUENCE,
    UnknownAttention,
    by_sequence,
    supports_by_sequence,
)
from distillm_ray.models.row_path import RowPath, backbone_of, run_row

LENGTHS = (5, 1, 9, 3)
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURES = ("llama", "gpt2", "sliding window", "soft cap", "sinks")


def make(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    match architecture:
        case "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
        case "sliding window":
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
        case "soft cap":
            model = Gemma2ForCausalLM(
                Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=2.0, sliding_window=4)
            )
        case "sinks":
            model = GptOssForCausalLM(
                GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, sliding_window=4)
            )
        case _:
            model = GPT2LMHeadModel(
                GPT2Config(vocab_size=50, n_embd=32, n_layer=3, n_head=4, n_positions=32)
            )
    with torch.no_grad():  # scores large enough for caps and sinks to matter
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(12)
            if "sinks" in name:
                parameter.normal_()
    model.set_attn_implementation("eager")
    model.eval()
    return model


def run(model: PreTrainedModel, attention: str, packs_up_to: int | None = None) -> Tensor:
    model.set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(1)
    token_ids_L = torch.randint(50, (sum(LENGTHS),), generator=generator)
    position_ids_L = torch.cat([torch.arange(length) for length in LENGTHS])
    path = RowPath(attention=attention, packs_up_to=packs_up_to)
    return run_row(backbone_of(model), token_ids_L, position_ids_L, path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_packed_row_equals_eager_attention_on_each_sequence_in_values_and_gradients(
    architecture: str,
) -> None:
    weights_LD = torch.randn(sum(LENGTHS), 32, generator=torch.Generator().manual_seed(2))
    results = []
    for attention, packs_up_to in ((BY_SEQUENCE, None), ("eager", 0)):
        model = make(architecture)
        hidden_LD = run(model, attention, packs_up_to)
        (hidden_LD * weights_LD).sum().backward()
        gradients = [item.grad for item in model.parameters() if item.grad is not None]
        results.append((hidden_LD.detach(), gradients))
    (packed_LD, packed_gradients), (alone_LD, alone_gradients) = results
    torch.testing.assert_close(packed_LD, alone_LD, rtol=0, atol=4e-6)
    assert len(packed_gradients) == len(alone_gradients) > 10
    for ours, theirs in zip(packed_gradients, alone_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "sliding window"])
def test_a_packed_row_equals_the_same_row_under_the_mask_of_transformers(architecture: str) -> None:
    model = make(architecture)
    with torch.no_grad():
        expected_LD = run(model, "sdpa")
        found_LD = run(model, BY_SEQUENCE)
    torch.testing.assert_close(found_LD, expected_LD, rtol=0, atol=2e-6)


def test_the_sdpa_of_transformers_drops_a_soft_cap_and_ours_does_not() -> None:
    model = make("soft cap")
    with torch.no_grad():
        exact_LD = run(model, "eager", 0)
        assert (run(model, "sdpa", 0) - exact_LD).abs().max() > 1e-3
        torch.testing.assert_close(run(model, BY_SEQUENCE), exact_LD, rtol=0, atol=4e-6)


def test_a_layer_of_another_kind_cannot_be_replaced() -> None:
    model = make("llama")
    assert supports_by_sequence(model)
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    assert not supports_by_sequence(model)


def attend(mask: Tensor | None = None, **arguments: Any) -> Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(3))
    output, _ = by_sequence(module, query, key, value, mask, **arguments)
    return output


def test_an_attention_that_is_called_in_an_unknown_way_is_refused() -> None:
    with pytest.raises(UnknownAttention, match="Module passes position_bias to its attention"):
        attend(boundaries=(0, 2, 6), position_bias=torch.ones(1))
    with pytest.raises(UnknownAttention, match="makes its own attention mask"):
        attend(torch.ones(6, 6), boundaries=(0, 2, 6))
    with pytest.raises(UnknownAttention, match="does not hand arguments on"):
        attend()


def test_arguments_without_influence_are_ignored() -> None:
    expected = attend(boundaries=(0, 2, 6))
    ignored = {"use_cache": False, "position_ids": torch.arange(6)}
    assert torch.equal(attend(boundaries=(0, 2, 6), **ignored), expected)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_short_sequences_train_in_bfloat16_as_exactly_as_with_sdpa(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(architecture).bfloat16().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(model.config, name, 0.0)
    explicit, found = packed_attention._explicit, []

    def counted(*arguments: Any) -> Tensor:
        found.append(arguments)
        return explicit(*arguments)

    monkeypatch.setattr(packed_attention, "_explicit", counted)
    results = []
    for short in (0, packed_attention.SHORT):
        monkeypatch.setattr(packed_attention, "SHORT", short)
        hidden_LD = run(model, BY_SEQUENCE).float()
        assert bool(found) == (short > 0)
        model.zero_grad()
        hidden_LD.square().mean().backward()
        gradients = [one.grad.float() for one in model.parameters() if one.grad is not None]
        results.append(torch.cat([one.flatten() for one in (hidden_LD.detach(), *gradients)]))
    found.clear()
    with torch.no_grad():
        run(model.eval(), BY_SEQUENCE)
    assert not found, "without a backward sdpa is faster"
    model.float().zero_grad()
    hidden_LD = run(model, BY_SEQUENCE)
    hidden_LD.square().mean().backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    exact = torch.cat([one.flatten() for one in (hidden_LD.detach(), *gradients)])
    in_sdpa, in_memory = ((one - exact).norm() for one in results)
    assert in_memory <= 1.2 * in_sdpa
