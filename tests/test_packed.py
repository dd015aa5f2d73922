"""Packed models: equal to each sequence alone, or refused with the reason.

Axes: L packed tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPT2Model,
    Lfm2Config,
    LlamaForCausalLM,
    LlamaModel,
    Phi3Config,
    PretrainedConfig,
)

from distillm_ray.config import TargetsConfig, TeacherConfig
from distillm_ray.errors import ModelError
from distillm_ray.learner.held_out_loss import held_out_loss
from distillm_ray.loss.distillation_head import install_distillation_head
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead, load_frozen_head
from distillm_ray.models.packed import PackedModel, check_head, load_packed_model
from distillm_ray.models.row_path import backbone_of, refuse_by_config
from distillm_ray.teacher.scorer import Scorer
from distillm_ray.types import Source
from tests import make

CPU = torch.device("cpu")
VOCABULARY_SIZE = 60  # of the tokenizer; the models have 64 rows
LENGTHS = (6, 1, 9)
SPREAD: dict[str, Any] = {"initializer_range": 0.3}  # spreads the logits, so that errors show
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": make.llama_config(**SPREAD, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, **SPREAD),
    # The convolution of its first layer reads over the sequence boundary.
    "lfm2": Lfm2Config(**make.SMALL, **SPREAD, layer_types=["conv", "full_attention"]),
}
ROLES = ("student", "teacher")


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        made[name] = tmp_path_factory.mktemp("models") / name
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


def load(directory: Path, dtype: torch.dtype = torch.float32) -> PackedModel:
    return load_packed_model(directory, role="student", dtype=dtype, device=CPU)


def start(directory: Path, role: str, dtype: Literal["float32", "bfloat16"] = "float32") -> str:
    """Load and check a model as the scorer or the learner does; what it says about packing."""
    if role == "student":
        packed = load(directory, resolve_dtype(dtype, CPU))
        install_distillation_head(packed.model, vocabulary_size=VOCABULARY_SIZE)
        return packed.remark

    async def start_and_stop() -> str:
        scorer = Scorer(
            TeacherConfig(model=directory, dtype=dtype, num_threads=1),
            TargetsConfig(),
            vocabulary_size=VOCABULARY_SIZE,
            device=CPU,
        )
        await scorer.start()
        remark = scorer.remark
        await scorer.stop()
        return remark

    return asyncio.run(start_and_stop())


# ---- exact ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2"])
def test_the_logits_of_a_packed_row_are_those_of_each_sequence_alone(
    directories: dict[str, Path], name: str
) -> None:
    packed = load(directories[name])
    head = load_frozen_head(directories[name], vocabulary_size=64)
    plain = AutoModelForCausalLM.from_pretrained(directories[name], attn_implementation="eager")
    token_ids_L = torch.randint(64, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    position_ids_L = torch.cat([torch.arange(length) for length in LENGTHS])
    with torch.no_grad():
        hidden_LD = packed.forward(token_ids_L, position_ids_L)
        expected_LV = torch.cat([plain(ids[None]).logits[0] for ids in token_ids_L.split(LENGTHS)])
    assert hidden_LD.shape == (sum(LENGTHS), 16)
    torch.testing.assert_close(head.logits(hidden_LD), expected_LV, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_keeps_packed_sequences_apart_is_accepted(
    directories: dict[str, Path], name: str, role: str, dtype: Literal["float32", "bfloat16"]
) -> None:
    assert start(directories[name], role, dtype) == ""


@pytest.mark.parametrize("training", [True, False])
def test_the_check_turns_dropout_off_and_restores_the_mode(training: bool) -> None:
    config = GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5)
    model = AutoModelForCausalLM.from_config(config).train(training)
    head = FrozenHead(weight_VD=model.get_output_embeddings().weight)
    check_head(model, head, role="student")
    assert model.training is training
    assert model.transformer.h[0].mlp.dropout.training is training


def test_the_held_out_loss_is_the_mean_cross_entropy_of_each_sequence_alone(
    directories: dict[str, Path],
) -> None:
    numbers = np.random.default_rng(0)
    demonstrations = [
        make.rollout(
            f"r{length}",
            prompt=numbers.integers(0, 60, 4),
            response=numbers.integers(0, 60, length),
            mask=np.arange(length) != 1,
            source=Source.DATASET,
        )
        for length in (5, 1, 8)
    ]
    plain = AutoModelForCausalLM.from_pretrained(directories["llama"])
    losses = []
    for one in demonstrations:
        ids_L = torch.from_numpy(np.concatenate([one.prompt_ids, one.response_ids])).long()
        with torch.no_grad():
            logits_TV = plain(ids_L[None]).logits[0, 3:-1, :VOCABULARY_SIZE]
        log_probs_TV = logits_TV.double().log_softmax(-1)
        losses += [
            -log_probs_TV[index, token].item()
            for index, token in enumerate(one.response_ids)
            if one.loss_mask[index]
        ]
    found = held_out_loss(
        directories["llama"],
        demonstrations,
        dtype="float32",
        vocabulary_size=VOCABULARY_SIZE,
        max_batch_tokens=16,
        device="cpu",
    )
    assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


# ---- one sequence a pass -------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_model_with_convolutions_over_tokens_runs_one_sequence_a_pass_and_says_so(
    directories: dict[str, Path], role: str
) -> None:
    remark = start(directories["lfm2"], role)
    assert remark.startswith("Lfm2ForCausalLM: one sequence a pass, attention: sdpa")
    assert "its layers keep state along a row (conv)" in remark


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_leak_after_the_last_layer_is_found(
    directories: dict[str, Path],
    role: str,
    dtype: Literal["float32", "bfloat16"],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = LlamaModel.forward

    def smeared(self: LlamaModel, *args: Any, **kwargs: Any) -> Any:
        output: Any = forward(self, *args, **kwargs)
        hidden_BLD = output.last_hidden_state
        previous_BLD = torch.nn.functional.pad(hidden_BLD, (0, 0, 1, 0))[:, :-1]
        output.last_hidden_state = hidden_BLD + 0.5 * previous_BLD
        return output

    monkeypatch.setattr(LlamaModel, "forward", smeared)
    remark = start(directories["llama"], role, dtype)
    assert remark.startswith("LlamaForCausalLM: one sequence a pass")
    assert "state leaks from one sequence of a row into the next" in remark


@pytest.mark.parametrize("role", ROLES)
def test_a_model_that_ignores_position_ids_runs_one_sequence_a_pass(
    directories: dict[str, Path], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = GPT2Model.forward

    def counted(self: GPT2Model, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GPT2Model, "forward", counted)
    remark = start(directories["gpt2"], role)
    assert remark.startswith("GPT2LMHeadModel: one sequence a pass")
    assert "index out of range" in remark, "the row is longer than the context"


@pytest.mark.parametrize(("lengths", "passes"), [((4, 7, 3), 1), ((4, 9, 3), 3)])
def test_a_rope_that_depends_on_the_rows_longest_sequence_packs_up_to_its_limit(
    lengths: tuple[int, ...], passes: int, tmp_path: Path
) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    config = Phi3Config(
        **make.SMALL,
        rope_parameters={**rope, "original_max_position_embeddings": 8},
        original_max_position_embeddings=8,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    packed = load(tmp_path)
    assert packed.path.packs_up_to == 8
    calls = []
    handle = backbone_of(packed.model).register_forward_hook(lambda *_: calls.append(1))
    ids_L = torch.randint(64, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    positions_L = torch.cat([torch.arange(length) for length in lengths])
    with torch.no_grad():
        row_LD = packed.forward(ids_L, positions_L)
        assert len(calls) == passes
        handle.remove()
        pieces = zip(ids_L.split(lengths), positions_L.split(lengths), strict=True)
        alone_LD = torch.cat([packed.forward(*piece) for piece in pieces])
    torch.testing.assert_close(row_LD, alone_LD, rtol=0, atol=1e-5)


# ---- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FalconConfig(alibi=True), "alibi must be false in the config of a falcon model"),
        (Gemma3TextConfig(attn_logit_softcapping=50.0), "attn_logit_softcapping must be null"),
    ],
)
def test_an_attention_that_transformers_computes_wrongly_is_refused_by_key(
    config: PretrainedConfig, said: str
) -> None:
    with pytest.raises(ModelError, match=rf"student\.model: {said}"):
        refuse_by_config(config, "student.model")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("change", ["doubled", "soft-capped"])
def test_a_model_that_changes_its_logits_after_the_head_is_refused(
    directories: dict[str, Path], role: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaForCausalLM.forward

    def changed(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output: Any = forward(self, *args, **kwargs)
        logits = output.logits
        output.logits = 2 * logits if change == "doubled" else 30 * torch.tanh(logits / 30)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", changed)
    message = rf"{role}\.model: the logits of LlamaForCausalLM must be its output head applied to"
    with pytest.raises(ModelError, match=message):
        start(directories["llama"], role)


@pytest.mark.parametrize("role", ROLES)
def test_logits_that_are_not_numbers_are_refused(
    directories: dict[str, Path], role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaForCausalLM.forward

    def broken(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        output: Any = forward(self, *args, **kwargs)
        output.logits = output.logits * float("nan")
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", broken)
    with pytest.raises(ModelError, match=rf"{role}\.model: the logits of .* differ by nan"):
        start(directories["llama"], role)


@pytest.mark.parametrize("role", ROLES)
def test_a_directory_without_safetensors_cannot_be_loaded(
    directories: dict[str, Path], tmp_path: Path, role: str
) -> None:
    shutil.copy(directories["llama"] / "config.json", tmp_path)
    with pytest.raises(ModelError, match=rf"{role}\.model: .* cannot be loaded"):
        start(tmp_path, role)


def test_the_held_out_loss_names_the_model_by_its_role(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"teacher\.model: .* cannot be loaded"):
        held_out_loss(
            tmp_path,
            [],
            dtype="float32",
            vocabulary_size=VOCABULARY_SIZE,
            max_batch_tokens=16,
            device="cpu",
            role="teacher",
        )
