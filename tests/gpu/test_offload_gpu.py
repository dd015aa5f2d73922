"""`learner.offload` on a real GPU: the same steps, and less of the GPU's memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from distillm_ray.config import StudentConfig
from distillm_ray.learner.learner import Learner
from distillm_ray.learner.offload import async_io_problem
from tests import make
from tests.integration import test_learner as on_cpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

CASES: tuple[tuple[int, str], ...] = tuple(
    (stage, offload) for stage in (1, 2, 3) for offload in ("none", "cpu")
)


def run(_: int, directory: Path, cases: tuple[tuple[int, str], ...]) -> None:
    """Three steps of each case; one process, because the process group stays."""
    for stage, offload in cases:
        place = {"offload_directory": directory / "nvme"} if offload == "nvme" else {}
        before = torch.cuda.memory_allocated()
        learner = Learner(
            on_cpus.learner_config(
                stage, optimizer="adamw", learning_rate=1e-3, offload=offload, **place
            ),
            StudentConfig(model=directory / "student", dtype="bfloat16"),
            on_cpus.LOSS,
            teacher_head=on_cpus.teacher_head(),
            vocabulary_size=on_cpus.VOCABULARY,
            device=torch.device("cuda", 0),
            seed=0,
            persistence_threshold=0,
        )
        steps = on_cpus.train(learner, 0, on_cpus.STEPS)
        facts = {
            "losses": [step["loss"] for step in steps],
            "bytes": torch.cuda.memory_allocated() - before,
        }
        (directory / f"{stage}-{offload}.json").write_text(json.dumps(facts))


def facts_of(directory: Path, stage: int, offload: str) -> dict[str, Any]:
    return json.loads((directory / f"{stage}-{offload}.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("offload")
    make.llama(
        vocab_size=on_cpus.VOCABULARY + 3, hidden_size=256, intermediate_size=1024
    ).save_pretrained(directory / "student")
    spawn(run, args=(directory, CASES), nprocs=1)
    return directory


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offloaded_steps_equal_those_on_the_gpu_and_take_less_of_its_memory(
    runs: Path, stage: int
) -> None:
    plain, offloaded = (facts_of(runs, stage, offload) for offload in ("none", "cpu"))
    assert offloaded["losses"] == pytest.approx(plain["losses"], rel=1e-2)
    assert offloaded["bytes"] < plain["bytes"]


def test_state_on_a_disk_gives_the_same_steps(runs: Path) -> None:
    if problem := async_io_problem(build=True):
        pytest.skip(problem)
    spawn(run, args=(runs, ((3, "nvme"),)), nprocs=1)
    found, plain = (facts_of(runs, 3, offload) for offload in ("nvme", "none"))
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-2)
