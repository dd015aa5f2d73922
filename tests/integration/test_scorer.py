"""The scorer on a tiny Llama: targets equal those of each sequence alone.

Axes: T loss tokens, D hidden size, K top-k, V vocabulary.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from distillm_ray.config import TargetsConfig, TeacherConfig
from distillm_ray.errors import ConfigError
from distillm_ray.models.packed import PackedModel
from distillm_ray.teacher.scorer import Scorer, to_numpy
from distillm_ray.types import (
    HiddenTargets,
    LogitTargets,
    Rollout,
    ScoreReport,
    TeacherTargets,
    TopKTargets,
)
from tests import make

pytestmark = pytest.mark.integration

VOCABULARY_SIZE = 50
PADDED_SIZE = 64


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LlamaForCausalLM]:
    """A teacher whose vocabulary is padded beyond the tokenizer's 50 ids, and its directory."""
    model = make.llama(
        vocab_size=PADDED_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    ).eval()
    directory = tmp_path_factory.mktemp("teacher")
    model.save_pretrained(directory)
    return directory, model


def rollouts(count: int) -> list[Rollout]:
    numbers = np.random.default_rng(1)
    made = []
    for index in range(count):
        length = int(numbers.integers(1, 30))
        mask = numbers.random(length) < 0.7
        mask[-1] = True
        made.append(
            make.rollout(
                f"r{index}",
                prompt=numbers.integers(0, 50, int(numbers.integers(1, 20))),
                response=numbers.integers(0, 50, length),
                mask=mask,
            )
        )
    return made


def score_all(scorer: Scorer, sequences: list[Rollout]) -> list[tuple[ScoreReport, TeacherTargets]]:
    async def work() -> list[tuple[ScoreReport, TeacherTargets]]:
        await scorer.start()
        scored = await asyncio.gather(*(scorer.score(one) for one in sequences))
        await scorer.stop()
        return scored

    return asyncio.run(work())


def scorer_for(
    directory: Path,
    kind: Literal["hidden", "top_k", "logits"] = "hidden",
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_batch_tokens: int = 120,
    k: int = 5,
) -> Scorer:
    return Scorer(
        TeacherConfig(
            model=directory, dtype=dtype, max_batch_tokens=max_batch_tokens, num_threads=1
        ),
        TargetsConfig(type=kind, k=k),
        vocabulary_size=VOCABULARY_SIZE,
        device="cpu",
    )


@torch.inference_mode()
def alone(model: LlamaForCausalLM, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the head and logits that predict each loss token, from the sequence alone."""
    token_ids = torch.from_numpy(
        np.concatenate([rollout.prompt_ids, rollout.response_ids]).astype(np.int64)
    )[None]
    captured = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    logits = model(token_ids).logits[0]
    handle.remove()
    rows = [
        len(rollout.prompt_ids) - 1 + offset
        for offset, covered in enumerate(rollout.loss_mask)
        if covered
    ]
    return captured[0][0][rows], logits[rows][:, :VOCABULARY_SIZE]


def test_hidden_targets_are_the_heads_inputs_of_the_sequence_alone(
    teacher: tuple[Path, LlamaForCausalLM],
) -> None:
    directory, model = teacher
    sequences = rollouts(20)
    scored = score_all(scorer_for(directory), sequences)
    for rollout, (report, targets) in zip(sequences, scored, strict=True):
        expected_TD, _ = alone(model, rollout)
        assert isinstance(targets, HiddenTargets)
        assert len(targets.values_TD) == rollout.num_loss_tokens
        np.testing.assert_allclose(targets.values_TD, expected_TD.numpy(), atol=2e-5)
        assert report.num_tokens == rollout.num_tokens
        assert report.nbytes == rollout.num_loss_tokens * 32 * 4


def test_queued_sequences_share_forward_passes_up_to_the_token_budget(
    teacher: tuple[Path, LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = teacher
    sequences = rollouts(20)
    num_tokens = []
    forward = PackedModel.forward

    def counted(self: PackedModel, token_ids_L: Tensor, position_ids_L: Tensor) -> Tensor:
        num_tokens.append(len(token_ids_L))
        return forward(self, token_ids_L, position_ids_L)

    monkeypatch.setattr(PackedModel, "forward", counted)
    score_all(scorer_for(directory, max_batch_tokens=120), sequences)
    assert sum(num_tokens) == sum(one.num_tokens for one in sequences)
    assert max(num_tokens) <= 120
    # Any two consecutive batches hold more than the budget, else they would have been one.
    assert len(num_tokens) <= 2 * sum(num_tokens) / 120 + 1 < len(sequences)


def test_what_a_sequence_is_batched_with_does_not_change_its_targets(
    teacher: tuple[Path, LlamaForCausalLM],
) -> None:
    directory, _ = teacher
    sequences = rollouts(12)
    together = score_all(scorer_for(directory, max_batch_tokens=2000), sequences)
    longest = max(one.num_tokens for one in sequences)
    apart = score_all(scorer_for(directory, max_batch_tokens=longest), sequences[::-1])[::-1]
    for (_, first), (_, second) in zip(together, apart, strict=True):
        assert isinstance(first, HiddenTargets)
        assert isinstance(second, HiddenTargets)
        np.testing.assert_allclose(first.values_TD, second.values_TD, atol=2e-5)


def test_top_k_and_logits_follow_from_the_models_logits_without_the_padded_ids(
    teacher: tuple[Path, LlamaForCausalLM],
) -> None:
    directory, model = teacher
    sequences = rollouts(6)
    top = score_all(scorer_for(directory, "top_k"), sequences)
    full = score_all(scorer_for(directory, "logits"), sequences)
    for rollout, (_, some), (_, every) in zip(sequences, top, full, strict=True):
        _, logits_TV = alone(model, rollout)
        assert isinstance(some, TopKTargets)
        assert isinstance(every, LogitTargets)
        np.testing.assert_allclose(every.values_TV, logits_TV.numpy(), atol=1e-4)
        log_probs_TV = logits_TV.double().log_softmax(-1)
        expected = log_probs_TV.topk(5, dim=-1)
        np.testing.assert_allclose(some.log_probs_TK, expected.values.numpy(), atol=1e-4)
        np.testing.assert_array_equal(some.ids_TK, expected.indices.numpy())


def test_bfloat16_values_are_sent_as_their_bits(teacher: tuple[Path, LlamaForCausalLM]) -> None:
    directory, model = teacher
    (rollout,) = rollouts(1)
    ((report, targets),) = score_all(scorer_for(directory, dtype="bfloat16"), [rollout])
    expected_TD, _ = alone(model, rollout)
    assert isinstance(targets, HiddenTargets)
    assert targets.values_TD.dtype == np.uint16
    # bfloat16 is the upper half of a float32
    values = (targets.values_TD.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_allclose(values, expected_TD.numpy(), atol=0.1)
    assert report.nbytes == rollout.num_loss_tokens * 32 * 2
    exact = torch.tensor([1.0, -2.5, 3.0e38, 0.0], dtype=torch.bfloat16)
    assert to_numpy(exact).tolist() == [0x3F80, 0xC020, 0x7F62, 0]


def test_a_sequence_longer_than_a_forward_pass_is_refused(
    teacher: tuple[Path, LlamaForCausalLM],
) -> None:
    directory, _ = teacher
    longest = max(rollouts(4), key=lambda one: one.num_tokens)
    scorer = scorer_for(directory, max_batch_tokens=longest.num_tokens - 1)
    with pytest.raises(ValueError, match=r"teacher\.max_batch_tokens, got"):
        score_all(scorer, [longest])


def test_a_failed_forward_pass_raises_in_its_callers_and_the_scorer_continues(
    teacher: tuple[Path, LlamaForCausalLM],
) -> None:
    directory, _ = teacher
    scorer = scorer_for(directory)
    good = rollouts(1)[0]
    bad = make.rollout("bad", prompt=[PADDED_SIZE + 5])

    async def work() -> None:
        await scorer.start()
        with pytest.raises(IndexError):
            await scorer.score(bad)
        report, _ = await scorer.score(good)
        assert report.num_tokens == good.num_tokens
        await scorer.stop()

    asyncio.run(work())


def test_tensor_parallelism_is_refused_with_the_key_to_raise_instead(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"raise teacher\.actors"):
        Scorer(
            TeacherConfig(model=tmp_path, tensor_parallel=2),
            TargetsConfig(),
            vocabulary_size=50,
            device="cpu",
        )
