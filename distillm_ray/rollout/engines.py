"""Makes the generator of an engine. Engines are imported here: other processes load none."""

from __future__ import annotations

from distillm_ray.config import GeneratorPoolConfig
from distillm_ray.rollout.generator import Generator, GeneratorJob


def make_generator(config: GeneratorPoolConfig, job: GeneratorJob) -> Generator:
    """The generator of `config.engine`; `start` then loads its model."""
    match config.engine.type:
        case "vllm":
            from distillm_ray.rollout.vllm_engine import VllmGenerator  # noqa: PLC0415

            assert job.teacher is None, "the config refuses rollout.teacher_mix with vLLM"
            return VllmGenerator(config, job)
        case "transformers":
            from distillm_ray.rollout.transformers_engine import (  # noqa: PLC0415
                TransformersGenerator,
            )

            return TransformersGenerator(config, job)
