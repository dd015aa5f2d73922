"""All scores of a model: ROUGE-L and BLEU of its responses, and its held-out loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from distillm_ray.cluster import placement
from distillm_ray.cluster.actors import ask, thread_settings
from distillm_ray.config import Config, Dtype, RemotePath
from distillm_ray.evaluation import scores
from distillm_ray.evaluation.responder import Responder, ServedModel, serving
from distillm_ray.evaluation.results import ModelScores
from distillm_ray.models.directory import ModelFacts
from distillm_ray.types import Device, Prompt, Rollout, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def served_student(config: Config, facts: ModelFacts, device: Device) -> ServedModel:
    """A student's directory in the pool of `evaluation.student`."""
    return ServedModel(
        facts=facts,
        model=config.student,
        source=Source.STUDENT,
        spec=placement.student_evaluation(config, device),
        pool=config.evaluation.student,
    )


def served_teacher(config: Config, facts: ModelFacts, device: Device) -> ServedModel:
    """The teacher in the pool of `evaluation.teacher`."""
    assert config.teacher is not None
    assert config.evaluation.teacher is not None
    return ServedModel(
        facts=facts,
        model=config.teacher,
        source=Source.TEACHER,
        spec=placement.teacher_evaluation(config, device),
        pool=config.evaluation.teacher,
    )


def evaluation_seeds(config: Config) -> tuple[int, ...]:
    """The sampling seeds. Greedy decoding uses only the first one."""
    section = config.evaluation
    return section.seeds[:1] if section.sampling.temperature == 0.0 else section.seeds


def score_responses(
    responder: Responder, prompts: Sequence[Prompt], config: Config
) -> tuple[ModelScores, list[list[Rollout]]]:
    """ROUGE-L and BLEU over the seeds, and the responses, seed by seed."""
    responses = [
        responder.respond(prompts, config.evaluation.sampling, seed)
        for seed in evaluation_seeds(config)
    ]
    return scores.score_responses(prompts, responses), responses


def score_model(
    config: Config,
    served: ServedModel,
    prompts: Sequence[Prompt],
    validation: Sequence[Rollout],
    *,
    device: Device,
    tokenizer: PreTrainedTokenizerBase,
    end_token_id: int,
    interrupt: Callable[[], None],
) -> tuple[ModelScores, list[list[Rollout]]]:
    """All scores of a model directory, and its responses, seed by seed.

    Responses and held-out loss are computed at the same time where the cluster has room for both;
    otherwise the loss waits until the pool has ended.
    """
    with serving(
        config,
        served,
        config.evaluation.sampling,
        device=device,
        tokenizer=tokenizer,
        end_token_id=end_token_id,
        interrupt=interrupt,
    ) as responder:
        loss = None
        if validation:
            loss = start_held_out_loss(config, served, validation, device=device)
        model_scores, responses = score_responses(responder, prompts, config)
    if loss is None:
        return model_scores, responses
    limit_s = config.evaluation.held_out_loss.timeout_s
    validation_loss = ask(
        loss,
        "the held-out loss (evaluation.held_out_loss.timeout_s)",
        timeout_s=limit_s,
        interrupt=interrupt,
    )
    return dataclasses.replace(model_scores, validation_loss=validation_loss), responses


def start_held_out_loss(
    config: Config, served: ServedModel, validation: Sequence[Rollout], *, device: Device
) -> ray.ObjectRef[float]:
    """Start the task that computes the cross-entropy of a model directory, token mean in nats."""
    spec = placement.held_out_loss(config, device)
    remote: Any = ray.remote  # its annotations know only some of its options
    task = remote(
        num_cpus=spec.cpus,
        num_gpus=spec.gpus,
        max_retries=0,
        label_selector=dict(spec.node_labels),
        runtime_env={"env_vars": thread_settings(spec.num_threads, device)},
    )(_held_out_loss)
    return task.remote(
        served.facts.source,
        validation,
        dtype=served.model.dtype,
        vocabulary_size=served.facts.vocabulary_size,
        max_batch_tokens=config.evaluation.held_out_loss.max_batch_tokens,
        device=device,
        trust_remote_code=served.model.trust_remote_code,
        num_threads=spec.num_threads,
    )


def _held_out_loss(
    model: Path | RemotePath,
    validation: Sequence[Rollout],
    *,
    dtype: Dtype,
    vocabulary_size: int,
    max_batch_tokens: int,
    device: Device,
    trust_remote_code: bool,
    num_threads: int,
) -> float:
    # Imported in the task: the driver loads no model code.
    from distillm_ray.learner.held_out_loss import held_out_loss  # noqa: PLC0415
    from distillm_ray.remote.inputs import fetched  # noqa: PLC0415

    return held_out_loss(
        fetched(model),
        validation,
        dtype=dtype,
        vocabulary_size=vocabulary_size,
        max_batch_tokens=max_batch_tokens,
        device=device,
        trust_remote_code=trust_remote_code,
        num_threads=num_threads,
    )
