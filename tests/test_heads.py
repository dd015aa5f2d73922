"""Output heads: rules read from a config, frozen heads read from a checkpoint, the student's head.

Axes: L tokens, N loss positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from distillm_ray.config import CrossEntropy, SkewKL
from distillm_ray.errors import ModelError
from distillm_ray.loss.distillation_head import DistillationHead, install_distillation_head
from distillm_ray.loss.head_loss import HeadLoss, LossRequest, WeightedTerm
from distillm_ray.loss.teacher_tensors import TeacherHidden
from distillm_ray.models.heads import FrozenHead, load_frozen_head
from distillm_ray.models.logit_rules import LogitRule, logit_rule
from tests import make

VOCABULARY = 60  # of the tokenizer; the models have 64 rows

SMALL: dict[str, Any] = make.SMALL | {
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CONFIGS: dict[str, tuple[PretrainedConfig, LogitRule]] = {
    "llama": (LlamaConfig(**SMALL, tie_word_embeddings=False), LogitRule()),
    "llama-tied": (LlamaConfig(**SMALL, tie_word_embeddings=True), LogitRule()),
    "qwen3": (Qwen3Config(**SMALL), LogitRule()),
    "gpt2": (
        GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64),
        LogitRule(),
    ),
    "phi-bias": (
        PhiConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}),
        LogitRule(),
    ),
    "gemma2": (Gemma2Config(**SMALL, query_pre_attn_scalar=8), LogitRule(soft_cap=30.0)),
    "gemma3": (
        Gemma3TextConfig(**SMALL, query_pre_attn_scalar=8, final_logit_softcapping=4.0),
        LogitRule(soft_cap=4.0),
    ),
    "cohere": (CohereConfig(**SMALL, logit_scale=0.25), LogitRule(scale=0.25)),
    "cohere2": (Cohere2Config(**SMALL), LogitRule(scale=0.0625)),
    "granite": (GraniteConfig(**SMALL, logits_scaling=6.0), LogitRule(scale=1 / 6)),
}
every_model = pytest.mark.parametrize("name", CONFIGS)


def build(name: str) -> PreTrainedModel:
    """A tiny model whose head and final norm are far from their initial values."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name][0]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def hidden_states(model: PreTrainedModel, token_ids_L: torch.Tensor) -> torch.Tensor:
    """The input of the output head."""
    with torch.no_grad():
        return model.base_model(input_ids=token_ids_L[None], use_cache=False).last_hidden_state[0]


def output_weight(model: PreTrainedModel) -> torch.Tensor:
    """The weight of the output head."""
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head.weight


# ---- rules ---------------------------------------------------------------------------------------


@every_model
def test_the_rule_follows_the_models_config(name: str) -> None:
    model_config, rule = CONFIGS[name]
    assert logit_rule(model_config.to_dict()) == rule


def test_a_rule_that_the_config_omits_is_the_architectures_default() -> None:
    assert logit_rule({"model_type": "gemma2"}).soft_cap == 30.0
    assert logit_rule({"model_type": "cohere2"}).scale == 0.0625
    assert logit_rule({"model_type": "llama"}) == LogitRule()


def test_the_base_width_of_minicpm3_divides_by_its_hidden_size() -> None:
    config = {"model_type": "minicpm3", "dim_model_base": 256, "hidden_size": 1024}
    assert logit_rule(config).scale == 0.25


def test_the_text_part_of_a_multimodal_config_is_read() -> None:
    nested = {"model_type": "granite", "logits_scaling": 4.0}
    assert logit_rule({"model_type": "granite4_vision", "text_config": nested}).scale == 0.25


@pytest.mark.parametrize(
    ("model_config", "key"),
    [
        ({"model_type": "minicpm", "dim_model_base": 256}, "dim_model_base"),
        ({"model_type": "mpt", "logit_scale": "inv_sqrt_d_model"}, "logit_scale"),
        ({"model_type": "muse_glimmer", "output_multiplier": 2.0}, "output_multiplier"),
        ({"model_type": "new", "logits_temperature": 0.5}, "logits_temperature"),
        ({"model_type": "llama", "logits_scaling": 2.0}, "logits_scaling"),
    ],
)
def test_an_unknown_rule_is_refused_by_name(model_config: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=key):
        logit_rule(model_config)


def test_soft_capping_of_attention_is_not_a_rule_of_the_head() -> None:
    assert logit_rule({"model_type": "new", "attn_logit_softcapping": 50.0}) == LogitRule()


# ---- the frozen head -----------------------------------------------------------------------------


@every_model
def test_the_frozen_head_reproduces_the_teachers_logits(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path)
    head = load_frozen_head(tmp_path, vocabulary_size=VOCABULARY)
    token_ids_L = torch.tensor([5, 9, 2, 31, 40])
    with torch.no_grad():
        expected = model(input_ids=token_ids_L[None]).logits[0, :, :VOCABULARY]
    assert not head.weight_VD.requires_grad
    torch.testing.assert_close(head.logits(hidden_states(model, token_ids_L)), expected)


def test_a_tied_checkpoint_has_one_tensor_and_it_is_found(tmp_path: Path) -> None:
    model = build("llama-tied")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    head = load_frozen_head(tmp_path, vocabulary_size=VOCABULARY, dtype=torch.bfloat16)
    assert head.weight_VD.dtype == torch.bfloat16
    expected = output_weight(model)[:VOCABULARY].bfloat16()
    assert torch.equal(head.weight_VD, expected)


def test_a_checkpoint_of_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    head = load_frozen_head(tmp_path, vocabulary_size=VOCABULARY)
    assert torch.equal(head.weight_VD, output_weight(model)[:VOCABULARY])


def test_a_checkpoint_of_the_bare_backbone_is_read(tmp_path: Path) -> None:
    model = build("gpt2")
    backbone = model.base_model
    assert isinstance(backbone, PreTrainedModel)
    backbone.save_pretrained(tmp_path)
    head = load_frozen_head(tmp_path, vocabulary_size=VOCABULARY)
    assert torch.equal(head.weight_VD, output_weight(model)[:VOCABULARY])


def test_a_directory_without_safetensors_is_refused(tmp_path: Path) -> None:
    CONFIGS["llama"][0].save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_frozen_head(tmp_path, vocabulary_size=VOCABULARY)


def test_a_head_with_fewer_rows_than_the_tokenizer_has_ids_is_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has 64 rows, the tokenizer has 65"):
        load_frozen_head(tmp_path, vocabulary_size=65)


# ---- the student's head --------------------------------------------------------------------------


@every_model
def test_an_installed_head_gives_the_gradients_of_the_models_own_logits(name: str) -> None:
    rule = CONFIGS[name][1]
    token_ids_L, labels_N = torch.tensor([5, 9, 2, 31, 40]), torch.tensor([9, 2, 31, 40, 7])
    expected_model = build(name)
    logits_NV = expected_model(input_ids=token_ids_L[None], use_cache=False).logits[0]
    expected = torch.nn.functional.cross_entropy(
        logits_NV[:, :VOCABULARY], labels_N, reduction="sum"
    )
    expected.backward()

    model = build(name)
    head = install_distillation_head(model, vocabulary_size=VOCABULARY)
    assert head.rule == rule
    hidden_ND = model.base_model(input_ids=token_ids_L[None], use_cache=False).last_hidden_state[0]
    term = WeightedTerm(term=CrossEntropy(), weights_N=torch.ones(5))
    result = head(hidden_ND, LossRequest(terms=(term,), labels_N=labels_N))
    assert isinstance(result, HeadLoss)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected)
    for (key, parameter), other in zip(
        model.named_parameters(), expected_model.parameters(), strict=True
    ):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=key)


@every_model
def test_a_model_with_an_installed_head_saves_the_same_files(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "before")
    install_distillation_head(model, vocabulary_size=VOCABULARY)
    model.save_pretrained(tmp_path / "after")
    before = load_file(tmp_path / "before" / "model.safetensors")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "before" / "config.json").read_text() == (
        tmp_path / "after" / "config.json"
    ).read_text()


def test_the_installed_head_shares_the_parameter_and_keeps_the_tie() -> None:
    model = build("llama-tied")
    weight = output_weight(model)
    head = install_distillation_head(model, vocabulary_size=VOCABULARY)
    assert head.weight is weight
    assert model.get_input_embeddings().weight is weight
    assert [key for key, _ in model.named_parameters()].count("lm_head.weight") == 0


def test_without_a_request_the_installed_head_is_a_linear_layer() -> None:
    model = build("gemma2")
    token_ids_1L = torch.tensor([[5, 9, 2]])
    with torch.no_grad():
        expected = model(input_ids=token_ids_1L).logits
        install_distillation_head(model, vocabulary_size=VOCABULARY)
        torch.testing.assert_close(model(input_ids=token_ids_1L).logits, expected)


def test_the_plain_implementation_gives_the_same_loss() -> None:
    torch.manual_seed(1)
    teacher = build("qwen3")
    losses = []
    for implementation in ("fused", "plain"):
        model = build("llama")
        head = install_distillation_head(
            model, vocabulary_size=VOCABULARY, implementation=implementation
        )
        assert isinstance(model.get_output_embeddings(), DistillationHead)
        token_ids_L = torch.tensor([5, 9, 2, 31, 40])
        weight_VD = output_weight(teacher).detach()[:VOCABULARY]
        frozen = FrozenHead(weight_VD=weight_VD)
        request = LossRequest(
            terms=(WeightedTerm(term=SkewKL(), weights_N=torch.ones(5)),),
            teacher=TeacherHidden(values_ND=hidden_states(teacher, token_ids_L), head=frozen),
        )
        result = head(hidden_states(model, token_ids_L), request)
        assert isinstance(result, HeadLoss)
        losses.append(result.loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] > 0.01


def test_a_head_that_is_not_a_plain_linear_layer_is_refused() -> None:
    model = build("llama")
    install_distillation_head(model, vocabulary_size=VOCABULARY)
    with pytest.raises(ModelError, match="is a DistillationHead, not a plain linear layer"):
        install_distillation_head(model, vocabulary_size=VOCABULARY)


def test_a_student_with_fewer_rows_than_the_tokenizer_has_ids_is_refused() -> None:
    with pytest.raises(ModelError, match="has 64 rows, the tokenizer has 65"):
        install_distillation_head(build("llama"), vocabulary_size=65)
