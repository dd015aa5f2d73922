"""Student text sampled from a mixture with the teacher: every number against full forward passes.

Axes: T response tokens, V vocabulary.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from distillm_ray.config import RolloutConfig, SamplingConfig, TransformersEngine
from distillm_ray.errors import ModelError
from distillm_ray.loss.policy_gradient import SampledTokens, importance_weights
from distillm_ray.rollout.generator import GeneratorJob, MixedTeacher
from distillm_ray.rollout.lockstep import mixture
from distillm_ray.rollout.transformers_engine import TransformersGenerator
from distillm_ray.types import Demand, Prompt, Rollout, Source
from distillm_ray.weights.gather import gather
from tests import make
from tests.architectures import ARCHITECTURES

V = 60  # of the tokenizer; the heads have 64 and 80 rows, whose padding is as likely as any token
END = 2
SHARE = 0.3
MAX_TOKENS = 24
LENGTHS = (3, 17, 8, 30, 5)
# Rounding of float32 with other shapes and a cache; it is 1e-5 with these models.
ROUNDING = 2e-4


@dataclass(frozen=True, slots=True)
class Models:
    """Two models that disagree, in directories."""

    student: Path
    teacher: Path

    def load(self, path: Path) -> PreTrainedModel:
        """In float32, with the attention that computes every option."""
        return AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval()


def student(seed: int = 0) -> PreTrainedModel:
    return make.llama(
        seed=seed, vocab_size=64, hidden_size=32, initializer_range=0.3, eos_token_id=END
    ).eval()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    parent = tmp_path_factory.mktemp("mixture")
    student().save_pretrained(parent / "student")
    make.llama(seed=1, vocab_size=80, hidden_size=48, initializer_range=0.3).save_pretrained(
        parent / "teacher"
    )
    return Models(parent / "student", parent / "teacher")


def generator(
    model: Path,
    teacher: Path | None,
    *,
    share: float = SHARE,
    max_tokens: int = MAX_TOKENS,
    max_batch_size: int = 16,
) -> TransformersGenerator:
    mixed = None
    if teacher is not None:
        mixed = MixedTeacher(model=teacher, share=share, dtype="float32", trust_remote_code=False)
    job = GeneratorJob(
        model=model,
        source=Source.STUDENT,
        sampling=SamplingConfig(max_tokens=max_tokens),
        end_token_ids=(END,),
        vocabulary_size=V,
        max_prompt_tokens=40,
        max_response_tokens=MAX_TOKENS,
        seed=0,
        device="cpu",
        teacher=mixed,
    )
    engine = TransformersEngine(max_batch_size=max_batch_size)
    return TransformersGenerator(RolloutConfig(engine=engine, dtype="float32"), job)


def prompts() -> list[Prompt]:
    numbers = np.random.default_rng(0)
    return [
        make.prompt(f"p{index}", token_ids=numbers.integers(3, V, length))
        for index, length in enumerate(LENGTHS)
    ]


def demands() -> list[Demand]:
    return [make.demand(index, of=prompt) for index, prompt in enumerate(prompts())]


async def fulfil(made: TransformersGenerator, asked: Sequence[Demand]) -> list[Rollout]:
    return await asyncio.gather(*(made.generate(demand) for demand in asked))


@torch.inference_mode()
def distributions(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """`[T, V]`, float64: the next-token distributions before the response's tokens, no cache."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt_ids, rollout.response_ids])).long()
    logits_LV = model(input_ids=ids[None], use_cache=False).logits[0, :, :V]
    return logits_LV[len(rollout.prompt_ids) - 1 : -1].double().softmax(-1)


def log_of(distributions_TV: Tensor, rollout: Rollout) -> Tensor:
    labels_T1 = torch.from_numpy(rollout.response_ids).long()[:, None]
    return distributions_TV.gather(1, labels_T1)[:, 0].log()


def recorded(rollout: Rollout) -> Tensor:
    assert rollout.logprobs is not None
    return torch.from_numpy(rollout.logprobs).double()


def largest_difference(
    rollouts: Sequence[Rollout], p: PreTrainedModel, q: PreTrainedModel
) -> float:
    """Of recorded log-probabilities from log(m p + (1 - m) q)."""
    apart = []
    for rollout in rollouts:
        mixed_TV = SHARE * distributions(p, rollout) + (1 - SHARE) * distributions(q, rollout)
        apart.append((recorded(rollout) - log_of(mixed_TV, rollout)).abs().max().item())
    return max(apart)


def test_the_mixture_of_impossible_and_certain_ids_is_exact() -> None:
    log_p = torch.tensor([0.5, 0.5, 0.0, 0.0]).log()
    log_q = torch.tensor([0.0, 0.2, 0.8, 0.0]).log()
    expected = torch.tensor([0.1, 0.26, 0.64, 0.0])
    torch.testing.assert_close(mixture(log_p, log_q, 0.2).exp(), expected)
    assert torch.equal(mixture(log_p, log_q, 1.0), log_p)
    assert torch.equal(mixture(log_p, log_q, 0.0), log_q)


async def test_log_probabilities_are_the_mixtures_at_every_token_of_prompts_of_any_length(
    models: Models,
) -> None:
    made = generator(models.student, models.teacher)
    await made.start()
    rollouts = await fulfil(made, demands())
    again = await fulfil(made, demands())
    await made.stop()
    assert made.remark == "", "prompts of different lengths share a batch"
    assert [len(one.prompt_ids) for one in rollouts] == list(LENGTHS)
    assert sum(len(one.response_ids) for one in rollouts) > 3 * MAX_TOKENS
    assert max(int(one.response_ids.max()) for one in rollouts) < V
    p, q = models.load(models.teacher), models.load(models.student)
    assert largest_difference(rollouts, p, q) < ROUNDING
    # The test can tell: neither model alone has these numbers.
    for alone in (p, q):
        gaps = [(recorded(one) - log_of(distributions(alone, one), one)).abs() for one in rollouts]
        assert torch.cat(gaps).mean() > 0.1
    assert [one.response_ids.tolist() for one in again] == [
        one.response_ids.tolist() for one in rollouts
    ]


async def test_first_tokens_follow_the_mixture_and_neither_model(models: Models) -> None:
    count = 3000
    made = generator(models.student, models.teacher, share=0.5, max_tokens=1, max_batch_size=500)
    await made.start()
    prompt = prompts()[0]
    rollouts = await fulfil(made, [make.demand(index, of=prompt) for index in range(count)])
    await made.stop()
    counts_V = np.bincount([int(one.response_ids[0]) for one in rollouts], minlength=V)
    p_V, q_V = (
        distributions(models.load(path), rollouts[0])[0].numpy()
        for path in (models.teacher, models.student)
    )

    def excess(probabilities_V: NDArray[np.float64]) -> float:
        """Pearson's statistic, in standard deviations above its mean."""
        expected_V = probabilities_V * count
        often_V = expected_V >= 5  # rarer ids share one bin
        observed = np.append(counts_V[often_V], counts_V[~often_V].sum())
        wanted = np.append(expected_V[often_V], expected_V[~often_V].sum() + 1e-9)
        freedom = len(wanted) - 1
        return float((((observed - wanted) ** 2 / wanted).sum() - freedom) / (2 * freedom) ** 0.5)

    assert excess(0.5 * p_V + 0.5 * q_V) < 4
    assert excess(p_V) > 40
    assert excess(q_V) > 40


async def test_responses_outside_of_the_demand_are_the_students_own(models: Models) -> None:
    """Probes and evaluations, also while demanded responses are generated."""
    mixed, plain = generator(models.student, models.teacher), generator(models.student, None)
    asked = demands()
    sampling = SamplingConfig(max_tokens=MAX_TOKENS)

    async def probes(made: TransformersGenerator) -> list[Rollout]:
        return await asyncio.gather(
            *(made.complete(prompt, sampling, seed=3) for prompt in prompts())
        )

    await mixed.start()
    await plain.start()
    rollouts, probed = await asyncio.gather(fulfil(mixed, asked), probes(mixed))
    expected, unmixed = await probes(plain), await fulfil(plain, asked)
    await mixed.stop()
    await plain.stop()
    p, q = models.load(models.teacher), models.load(models.student)
    assert largest_difference(rollouts, p, q) < ROUNDING
    for one, other in zip(probed, expected, strict=True):
        assert one.response_ids.tolist() == other.response_ids.tolist()
        assert torch.equal(recorded(one), recorded(other))
    for one in unmixed:
        torch.testing.assert_close(
            recorded(one), log_of(distributions(q, one), one), atol=ROUNDING, rtol=0
        )


async def test_a_teacher_that_is_the_student_leaves_ratios_of_one(models: Models) -> None:
    made = generator(models.student, models.student)
    await made.start()
    rollouts = await fulfil(made, demands())
    await made.stop()
    q = models.load(models.student)
    for one in rollouts:
        log_q_T = log_of(distributions(q, one), one)
        tokens = SampledTokens(
            log_p_N=log_q_T,
            log_q_N=log_q_T,
            behaviour_N=recorded(one),
            sequence_N=torch.zeros(len(log_q_T), dtype=torch.int64),
        )
        weights_N = importance_weights(tokens, largest=1.2)
        torch.testing.assert_close(weights_N, torch.ones_like(weights_N), atol=ROUNDING, rtol=0)


async def test_new_weights_change_the_students_part_only(models: Models) -> None:
    made = generator(models.student, models.teacher)
    await made.start()
    learned = student(seed=7)
    buckets = tuple(gather(learned, torch.float32, keep=True))
    await made.update_weights(make.weights(1, *buckets), keep_in_flight=True)
    rollouts = await fulfil(made, demands())
    await made.stop()
    assert {one.version for one in rollouts} == {1}
    p = models.load(models.teacher)
    assert largest_difference(rollouts, p, learned) < ROUNDING
    assert largest_difference(rollouts, p, models.load(models.student)) > 0.1


@pytest.mark.parametrize("name", ["GPT-2", "Gemma 2", "BLOOM", "Qwen2, sliding window", "LFM2"])
async def test_teachers_with_caps_windows_and_state_follow_exactly(
    name: str, models: Models, tmp_path: Path
) -> None:
    (one,) = (one for one in ARCHITECTURES if one.name == name)
    one.build().save_pretrained(tmp_path)
    made = generator(models.student, tmp_path)
    await made.start()
    rollouts = await fulfil(made, demands())
    await made.stop()
    q = models.load(models.student)
    assert largest_difference(rollouts, models.load(tmp_path), q) < ROUNDING


async def test_a_teacher_that_cannot_follow_is_refused_by_name(
    models: Models, tmp_path: Path
) -> None:
    (one,) = (one for one in ARCHITECTURES if one.name == "Mamba")
    one.build().save_pretrained(tmp_path)
    made = generator(models.student, tmp_path)
    with pytest.raises(ModelError, match=r"MambaForCausalLM cannot follow .*teacher_mix = 0\.3"):
        await made.start()
    await made.stop()


async def test_a_teacher_without_some_ids_is_refused(models: Models, tmp_path: Path) -> None:
    make.llama(vocab_size=V - 1).save_pretrained(tmp_path)
    made = generator(models.student, tmp_path)
    with pytest.raises(ModelError, match="has 59 rows, the tokenizer has 60 ids"):
        await made.start()
