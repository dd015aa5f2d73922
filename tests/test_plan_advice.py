"""The search for counts, on outcomes that a formula gives, and stage files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distillm_ray.config import Config
from distillm_ray.errors import UserError
from distillm_ray.plan.advice import Advice, Budget, advise, overrides, settled
from distillm_ray.plan.simulation import Counts, Outcome
from distillm_ray.plan.stages import (
    GenerationTimes,
    LearningTimes,
    Stages,
    non_negative_fit,
    read_stages,
    write_stages,
)
from tests import make

CONFIG = make.config(
    schedule={"type": "fixed", "phi": 0.5},
    rollout={"num_cpus": 1},
    teacher={"num_cpus": 1},
    learner={"num_cpus": 1},
)


def balanced(counts: Counts) -> Outcome:
    """Generators need 8 s a step, scorers 3 and learners 2, each shared by the role's processes."""
    needs = {
        "learner": 2.0 / counts.learners,
        "generator": 8.0 / counts.generators,
        "scorer": 3.0 / counts.scorers,
    }
    seconds = max(needs.values())
    return Outcome(
        step_seconds=(seconds,),
        wait_seconds=(seconds - needs["learner"],),
        core_seconds={"learner": 2.0, "generator": 8.0, "scorer": 3.0},
        coordination_seconds=0.0,
        busy_seconds={"learner": 2.0, "generator": 8.0, "scorer": 3.0},
        counts=counts,
        generated_sequences=1,
        scored_sequences=1,
    )


def advised(cpus: float) -> Advice:
    found = advise(CONFIG, "cpu", Budget(cpus=cpus, gpus=0), balanced)
    assert found is not None
    return found


def test_the_roles_that_limit_grow_until_the_learner_does() -> None:
    found = advised(7)
    assert found.counts == Counts(learners=1, generators=4, scorers=2)
    assert found.outcome.seconds == 2.0
    assert found.cpus == 7


def test_a_smaller_budget_gives_a_longer_step() -> None:
    found = advised(4)
    assert found.counts == Counts(learners=1, generators=2, scorers=1)
    assert found.outcome.limiting == "generator"


def test_a_larger_budget_adds_learners() -> None:
    assert advised(14).counts.learners == 2


def test_a_budget_below_one_process_of_each_role_holds_no_run() -> None:
    assert advise(CONFIG, "cpu", Budget(cpus=2, gpus=0), balanced) is None


def test_of_equal_steps_the_cheapest_counts_are_taken() -> None:
    def constant(counts: Counts) -> Outcome:
        return balanced(Counts(learners=1, generators=1, scorers=1))

    found = advise(CONFIG, "cpu", Budget(cpus=16, gpus=0), constant)
    assert found is not None
    assert found.counts == Counts(learners=1, generators=1, scorers=1)


def test_overrides_name_the_keys_and_are_empty_for_the_configs_own_counts() -> None:
    found = overrides(CONFIG, Counts(learners=1, generators=4, scorers=2))
    assert found == ["learner.workers=1", "rollout.actors=4", "teacher.actors=2"]
    assert overrides(CONFIG, Counts.of(CONFIG)) == []


def test_a_fit_of_exact_sums_finds_the_parts() -> None:
    features = [[1, 1, 40], [1, 2, 300], [1, 1, 600], [1, 3, 900]]
    seconds = [0.2 + 0.1 * rows + 0.003 * tokens for _, rows, tokens in features]
    assert non_negative_fit(features, seconds) == pytest.approx((0.2, 0.1, 0.003))


def test_a_part_that_would_be_negative_is_left_out() -> None:
    fit = non_negative_fit([[1, 10], [1, 20], [1, 40]], [0.9, 2.0, 4.1])
    assert fit[0] == 0.0
    assert fit[1] == pytest.approx(0.1, rel=0.05)


STAGES = Stages(
    device="cpu",
    cores=2,
    learning=LearningTimes(
        step=0.1, row=0.1, token=0.001, loss_token=0.002, validation_token=0.001, gather=0.2,
        checkpoint=1.0,
    ),
    generation=GenerationTimes(
        engine_step=0.02, token=0.001, prompt_token=0.0003, load=0.1, response_tokens=(4, 96)
    ),
    contention=1.2,
)  # fmt: skip


def test_stage_times_are_read_as_they_were_written(tmp_path: Path) -> None:
    write_stages(tmp_path / "deep" / "stages.json", STAGES)
    assert read_stages(tmp_path / "deep" / "stages.json") == STAGES


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"gather"', '"together"', "learning.gather: Field required"),
        ('"cores": 2', '"cores": "two"', "cores: Input should be a valid integer"),
        ("[\n   4,\n   96\n  ]", "[]", "at least one length of at least 1 token"),
        ("{", "", "Invalid JSON"),
    ],
)
def test_a_file_of_another_form_is_refused_by_field(
    tmp_path: Path, before: str, after: str, message: str
) -> None:
    path = tmp_path / "stages.json"
    write_stages(path, STAGES)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match="--stages") as refused:
        read_stages(path)
    assert message in str(refused.value)


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_stages(tmp_path / "none.json")


def test_an_elastic_pool_grows_in_the_plan_until_the_learner_does_not_wait() -> None:
    def config_of(most: int) -> Config:
        return make.config(rollout={"actors": {"min": 1, "max": most}}, teacher={"actors": 2})

    own = Counts(learners=1, generators=1, scorers=2)
    free = settled(config_of(16), own, balanced)
    assert free.limiting == "learner" and 1 < free.counts.generators <= 16
    bounded = settled(config_of(2), own, balanced)
    assert bounded.counts.generators == 2 and bounded.limiting == "generator"
    assert overrides(config_of(16), free.counts) == [], "they are within the range"
    found = overrides(config_of(16), replace(free.counts, learners=2))
    assert found == ["learner.workers=2", "teacher.actors=2"]
