"""vLLM on a real GPU frees its memory when it sleeps, and responds as before when it has woken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distillm_ray.config import RolloutConfig, SamplingConfig, VllmEngine
from distillm_ray.rollout.generator import GeneratorJob
from distillm_ray.rollout.vllm_engine import VllmGenerator
from distillm_ray.types import Source
from tests import make
from tests.integration.tiny import END, SPECIAL, WORDS, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

UTILIZATION = 0.5


def used_share() -> float:
    """Of the GPU's memory, by all processes."""
    free, total = torch.cuda.mem_get_info()
    return 1.0 - free / total


async def test_a_sleeping_engine_leaves_the_gpu_to_others_and_wakes_with_its_weights(
    tmp_path: Path,
) -> None:
    make_model(tmp_path / "student", seed=2)
    job = GeneratorJob(
        model=tmp_path / "student",
        source=Source.STUDENT,
        sampling=SamplingConfig(),
        end_token_ids=(SPECIAL.index(END),),
        vocabulary_size=len(SPECIAL) + len(WORDS),
        max_prompt_tokens=24,
        max_response_tokens=16,
        seed=0,
        device="cuda",
        sleeps=True,
    )
    engine = VllmEngine(gpu_memory_utilization=UTILIZATION)
    generator = VllmGenerator(RolloutConfig(engine=engine), job)
    before = used_share()
    await generator.start()
    try:
        prompt, greedy = make.prompt(token_ids=[5, 6, 7]), SamplingConfig(temperature=0.0)
        first = await generator.complete(prompt, greedy, seed=0)
        assert used_share() > before + 0.8 * UTILIZATION
        for _ in range(2):
            await generator.sleep()
            assert used_share() < before + 0.1, "what stays is the context"
            others = torch.empty(int(0.4 * torch.cuda.mem_get_info()[1]), dtype=torch.uint8).cuda()
            del others
            torch.cuda.empty_cache()
            await generator.wake()
            again = await generator.complete(prompt, greedy, seed=0)
            assert again.response_ids.tolist() == first.response_ids.tolist()
    finally:
        await generator.stop()
