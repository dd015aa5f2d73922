"""Every method in a run of twenty steps: what its batches hold, and that its own loss falls."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import pytest

from distillm_ray import local, preflight
from distillm_ray.config.files import load_config
from distillm_ray.log.records import EventRecord, StepRecord
from distillm_ray.methods import METHODS
from distillm_ray.report.console import ConsoleView
from tests.integration.tiny import make_config, records

STEPS, BATCH_SIZE = 20, 8
DATA, STUDENT = {"dataset"}, {"fresh"}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What a method's batches hold."""

    shelves: set[str]  # that any step drew from
    max_age: int = 0  # of the student's text
    sequences: int = STEPS * BATCH_SIZE
    writer: str = "dataset"  # of the responses of the data
    overrides: tuple[str, ...] = ()


# At the default lookahead of two steps and a publication every two steps, text is up to two old.
LEARNER = "learner={learning_rate: 0.003, warmup_steps: 0, min_learning_rate_ratio: 1.0}"
EXPECTED = {
    "sft": Expected(shelves=DATA),
    "kd": Expected(shelves=DATA),
    "seqkd": Expected(shelves=DATA, writer="teacher"),
    "imitkd": Expected(shelves=STUDENT),
    "gkd": Expected(shelves=DATA | STUDENT),
    "opd": Expected(shelves=STUDENT, max_age=2),
    "minillm": Expected(shelves=STUDENT, max_age=2),
    "distillm": Expected(
        shelves=DATA | STUDENT | {"replay"},
        max_age=STEPS,
        overrides=("schedule.start=0.5", "schedule.replay_ratio=decreasing"),
    ),
    "distillm2": Expected(
        shelves=DATA | STUDENT, max_age=2, sequences=2 * STEPS * BATCH_SIZE, writer="teacher"
    ),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("methods"), steps=STEPS, batch_size=BATCH_SIZE)


def run(job: Path, directory: Path, *overrides: str) -> list[StepRecord]:
    config = load_config(job, ["run.mode=local", f"run.directory={directory}", *overrides])
    local.check(config)
    view = ConsoleView(config.learner.num_steps, stream=io.StringIO())
    local.train(config, preflight.check(config), view)
    return records(config.run.local_directory, StepRecord)


def test_every_method_is_run() -> None:
    assert set(EXPECTED) == set(METHODS)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_method_trains_on_its_text_and_lowers_its_own_loss(
    name: str, job: Path, tmp_path: Path
) -> None:
    expected = EXPECTED[name]
    steps = run(job, tmp_path / "run", f"method={name}", LEARNER, *expected.overrides)
    assert [step.step for step in steps] == list(range(1, STEPS + 1))
    ids = [
        (shelf, one)
        for step in steps
        for shelf in step.rollout_ids
        for one in step.rollout_ids[shelf]
    ]
    assert {shelf for shelf, _ in ids} == expected.shelves
    assert len(ids) == expected.sequences
    assert {one.split("-")[0] for shelf, one in ids if shelf == "dataset"} <= {expected.writer}
    assert all(one.startswith("student-") for shelf, one in ids if shelf != "dataset")
    ages = [step.fresh_age_max for step in steps if step.mix.fresh]
    assert max(ages, default=0) <= expected.max_age
    assert not any(step.skipped for step in steps)
    losses = [step.loss for step in steps]
    assert mean(losses[-5:]) < mean(losses[:5])


def test_a_student_that_is_its_teacher_has_nothing_to_learn_on_its_own_text(
    job: Path, tmp_path: Path
) -> None:
    config = load_config(job)
    assert config.teacher is not None
    same = [f"student.model={config.teacher.model}", "teacher.dtype=float32"]
    steps = run(job, tmp_path / "run", "method=opd", "learner.learning_rate=1e-9", *same)
    assert [step.loss for step in steps] == pytest.approx([0.0] * STEPS, abs=1e-6)
    # Both sides are one distribution, from which the tokens were sampled.
    for step in steps:
        assert step.student_entropy == pytest.approx(step.teacher_entropy, rel=1e-5)
        assert step.top_overlap == 1.0
        assert 0.0 < step.teacher_probability < 1.0
    (check,) = (
        event for event in records(tmp_path / "run", EventRecord) if event.name == "self-check"
    )
    assert float(check.detail.split("at most ")[1].split()[0]) < 1e-6


def test_minillm_lowers_its_own_loss_on_text_that_the_teacher_helps_to_sample(
    job: Path, tmp_path: Path
) -> None:
    fresh = ("rollout.lookahead=1", "rollout.sync_interval=1", "rollout.max_staleness=0")
    minillm = ("method=minillm", LEARNER, *fresh)
    own = run(job, tmp_path / "own", *minillm)
    mixed = run(job, tmp_path / "mixed", *minillm, "rollout.teacher_mix=0.2")
    assert mean(step.loss for step in mixed[-5:]) < mean(step.loss for step in mixed[:5])
    assert mixed[0].loss != own[0].loss, "other responses"
    # The engine's log-probabilities are the mixture's, which are not the learner's.
    assert all(step.logprob_gap < 1e-4 for step in own)
    assert all(math.isnan(step.logprob_gap) for step in mixed)
