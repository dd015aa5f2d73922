"""A replay buffer with the settings of a config."""

from __future__ import annotations

from distillm_ray.config import Config, PairedSchedule
from distillm_ray.replay.buffer import ReplayBuffer
from distillm_ray.replay.schedule import Schedule
from distillm_ray.types import TrainingData


def build_buffer(config: Config, data: TrainingData) -> ReplayBuffer:
    """The buffer of a run, before the first draw."""
    return ReplayBuffer(
        prompts=data.prompts,
        demonstrations=data.demonstrations,
        schedule=Schedule.from_config(config.schedule, total_steps=config.learner.num_steps),
        paired=isinstance(config.schedule, PairedSchedule),
        corpus=data.corpus,
        corpus_batch=config.data.corpus_batch or 0,
        batch_size=config.learner.batch_size,
        capacity=config.replay.capacity,
        min_size=config.replay_min_size,
        lookahead=config.rollout.lookahead,
        sync_interval=config.rollout.sync_interval,
        validation_interval=config.validation.interval,
        seed=config.run.seed,
    )
