"""What a Ray Train worker does: build its rank of the learner and run the train loop."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import ray
import ray.train
import torch
from transformers import AutoTokenizer

from distillm_ray.batching import pack, plan_validation
from distillm_ray.cluster.services import ActorServices
from distillm_ray.learner.checkpoint import CheckpointDirectory
from distillm_ray.learner.learner import Learner
from distillm_ray.learner.train_loop import train_loop
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.models.heads import FrozenHead, load_frozen_head
from distillm_ray.run_directory import CHECKPOINT_FOLDER

if TYPE_CHECKING:
    from distillm_ray.cluster.learners import LearnerJob


def run(job: LearnerJob) -> None:
    """Train from the newest complete checkpoint, or from the beginning, to the end or a stop."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    config = job.config
    context = ray.train.get_context()
    device = torch.device("cpu")
    if job.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    learner = Learner(
        config.learner,
        config.student,
        config.loss,
        teacher_head=_teacher_head(job, device),
        vocabulary_size=job.vocabulary_size,
        device=device,
        seed=config.run.seed,
    )
    plans = plan_validation(
        ray.get(job.validation),
        num_ranks=context.get_world_size(),
        max_micro_batch_tokens=config.learner.max_micro_batch_tokens,
    )
    checkpoints = CheckpointDirectory(
        config.run.directory / CHECKPOINT_FOLDER, keep=config.checkpoint.keep
    )
    # One rank looks, so that all go on from the same one.
    (start, *_) = learner.collect(checkpoints.latest() if learner.rank == 0 else None)
    train_loop(
        ActorServices(
            job.wires,
            config,
            tokenizer=AutoTokenizer.from_pretrained(
                config.student.model, trust_remote_code=config.student.trust_remote_code
            ),
            probe_prompts=job.probe_prompts,
        ),
        learner,
        config,
        validation_batches=[pack(plan, None) for plan in plans[learner.rank]],
        publish_dtype=resolve_dtype(config.rollout.dtype, device),
        start=start,
    )


def _teacher_head(job: LearnerJob, device: torch.device) -> FrozenHead | None:
    """The learner's copy of the teacher's head, which `hidden` targets need."""
    config = job.config
    if not config.loss.needs_teacher or config.targets.type != "hidden":
        return None
    return load_frozen_head(
        config.teacher.model,
        vocabulary_size=job.vocabulary_size,
        dtype=resolve_dtype(config.teacher.dtype, device),
        device=device,
        trust_remote_code=config.teacher.trust_remote_code,
    )
