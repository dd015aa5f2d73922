"""A run whose student has adapters: they alone are published, and generators sample with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillm_ray.log.records import ProbeRecord, PublishRecord
from tests.integration.tiny import LIMIT_S, Driver, make_config, records

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_S)]

STEPS = 6


def test_generators_sample_from_the_adapted_student_of_which_they_get_the_adapters(
    tmp_path: Path,
) -> None:
    config = make_config(tmp_path, steps=STEPS, batch_size=8)
    command = (
        *("train", str(config), "rollout.engine={type: vllm, max_num_seqs: 8}"),
        *("student.lora={rank: 1, alpha: 4}", "learner.learning_rate=0.1"),
        *("validation={interval: 2, probe_prompts: 4}", "checkpoint.interval=100"),
    )
    with Driver(*command, log=tmp_path / "run.log") as driver:
        assert driver.wait(LIMIT_S) == 0, driver.output()
    published = [one for one in records(tmp_path / "run", PublishRecord) if one.step > 0]
    assert [one.step for one in published] == [2, 4]
    whole = (tmp_path / "student" / "model.safetensors").stat().st_size
    assert all(0 < one.nbytes < whole / 10 for one in published)
    probes = [one for one in records(tmp_path / "run", ProbeRecord) if one.step in (2, 4)]
    assert len(probes) == 2
    for one in probes:
        assert one.logprob_gap < 1e-3, "the engine's log-probabilities are the learner's"
