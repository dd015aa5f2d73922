"""Answers and scores of a model: for the end of a run, `evaluate` and `generate`.

A pool of generators answers; ROUGE-L and BLEU are computed from the decoded text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from distillm_ray.cluster.actor_pool import Actor
from distillm_ray.cluster.cluster import Cluster, ask, release
from distillm_ray.cluster.loop_actor import LoopPeers
from distillm_ray.config import Config, SamplingConfig, StudentConfig, TeacherConfig
from distillm_ray.data.templates import decode
from distillm_ray.evaluation.results import ModelScores
from distillm_ray.evaluation.scores import score_responses
from distillm_ray.models.directory import ModelFacts
from distillm_ray.types import Prompt, Rollout, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextmanager
def answering(
    cluster: Cluster,
    config: Config,
    model: ModelFacts,
    source: Source,
    *,
    end_token_id: int,
    trust_remote_code: bool,
) -> Iterator[Actor]:
    """A rollout loop without a buffer over a pool that answers with `model`; gone afterwards."""
    generators = cluster.generators(
        model, source, end_token_id=end_token_id, trust_remote_code=trust_remote_code
    )
    loop = cluster.loop(LoopPeers(generators=generators))
    try:
        ask(
            loop.start.remote(),
            "generators that start (twice run.startup_timeout_s)",
            timeout_s=2 * config.run.startup_timeout_s,
        )
        yield loop
    finally:
        release([loop, *generators])


def answer_all(
    loop: Actor,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    seed: int,
    *,
    tokenizer: PreTrainedTokenizerBase,
    timeout_s: float,
) -> list[Rollout]:
    """One answer a prompt, in order, with its text."""
    call = loop.answer.remote(prompts, sampling, seed)
    what = f"answers to {len(prompts)} prompts (a multiple of rollout.timeout_s)"
    rollouts = ask(call, what, timeout_s=timeout_s)
    return [dataclasses.replace(rollout, text=decode(tokenizer, rollout)) for rollout in rollouts]


def evaluation_seeds(config: Config) -> tuple[int, ...]:
    """One of them for greedy answers, which are the same for every seed."""
    section = config.evaluation
    return section.seeds[:1] if section.sampling.temperature == 0.0 else section.seeds


def score_answers(
    loop: Actor,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[ModelScores, list[list[Rollout]]]:
    """ROUGE-L and BLEU over the seeds of `evaluation`, and the answers, seed by seed."""
    sampling = config.evaluation.sampling
    limit = sampling.max_tokens or config.data.max_response_tokens
    sampling = sampling.model_copy(update={"max_tokens": limit})
    by_seed = [
        answer_all(
            loop,
            prompts,
            sampling,
            seed,
            tokenizer=tokenizer,
            timeout_s=config.rollout.timeout_s * max(1, len(prompts) // 8),
        )
        for seed in evaluation_seeds(config)
    ]
    return score_responses(prompts, by_seed), by_seed


def score_model(
    cluster: Cluster,
    config: Config,
    model: ModelFacts,
    section: TeacherConfig | StudentConfig,
    prompts: Sequence[Prompt],
    validation: Sequence[Rollout],
    *,
    tokenizer: PreTrainedTokenizerBase,
    end_token_id: int,
) -> tuple[ModelScores, list[list[Rollout]]]:
    """All scores of a model directory, and its answers, seed by seed.

    Answers and held-out loss are computed at the same time, where the cluster has room for both a
    generator pool and a learner. `section` says how the model is loaded.
    """
    source = Source.TEACHER if isinstance(section, TeacherConfig) else Source.STUDENT
    with answering(
        cluster,
        config,
        model,
        source,
        end_token_id=end_token_id,
        trust_remote_code=section.trust_remote_code,
    ) as loop:
        loss = cluster.held_out_loss(
            model,
            validation,
            dtype=section.dtype,
            vocabulary_size=model.vocabulary_size,
            trust_remote_code=section.trust_remote_code,
        )
        scores, answers = score_answers(loop, prompts, config, tokenizer=tokenizer)
    seconds = config.learner.data_timeout_s
    validation_loss = ask(loss, "the held-out loss (learner.data_timeout_s)", timeout_s=seconds)
    return dataclasses.replace(scores, validation_loss=validation_loss), answers
