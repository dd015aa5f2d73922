"""Which keys may change when a run is resumed."""

from typing import Any

import pytest

from distillm_ray.errors import RunDirectoryError
from distillm_ray.learner.resume import check_resume
from tests import make


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learner": {"learning_rate": 3e-4}},
        {"learner": {"steps": 200}, "rollout": {"actors": 4}, "teacher": {"actors": 2}},
        {"schedule": {"type": "adaptive", "increment": 0.2, "tolerance": 0.01}},
        {"run": {"directory": "/elsewhere/a"}},
        {"rollout": {"engine": {"type": "transformers"}}},
        {"checkpoint": {"interval": 7}, "evaluation": {"at_end": False}},
        {"learner": {"zero_stage": 2}},
    ],
)
def test_resources_thresholds_and_length_may_change(changes: dict[str, Any]) -> None:
    check_resume(make.config(), make.config(**changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"run": {"seed": 1}}, "run.seed: 0 in the run, 1 now"),
        (
            {"teacher": {"model": "/models/other"}},
            "teacher.model: '/models/teacher' in the run, '/models/other' now",
        ),
        ({"learner": {"batch_size": 16}}, "learner.batch_size: 8 in the run, 16 now"),
        ({"loss": {"temperature": 2.0}}, "loss.temperature: 1.0 in the run, 2.0 now"),
        (
            {"data": {"train": ["/data/b.jsonl"]}},
            "data.train: ['/data/train.jsonl'] in the run, ['/data/b.jsonl']",
        ),
        ({"schedule": {"type": "fixed"}}, "schedule: {'type': 'adaptive', "),
        ({"student": {"lora": {"rank": 4}}}, "student.lora: absent in the run, {'rank': 4, "),
        ({"validation": {"interval": 5}}, "validation.interval: 100 in the run, 5 now"),
    ],
)
def test_keys_that_define_the_run_may_not_change(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(RunDirectoryError) as caught:
        check_resume(make.config(), make.config(**changes))
    assert line in str(caught.value)
    assert "run.directory" in str(caught.value)


def test_all_fixed_keys_that_differ_are_named_at_once() -> None:
    with pytest.raises(RunDirectoryError) as caught:
        check_resume(make.config(), make.config(run={"seed": 1}, learner={"batch_size": 16}))
    assert "run.seed" in str(caught.value)
    assert "learner.batch_size" in str(caught.value)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (2, 3), (3, 2), (1, 0), (3, 0)])
def test_zero_stages_that_deepspeed_cannot_load_are_refused_by_name(
    before: int, after: int
) -> None:
    with pytest.raises(RunDirectoryError, match=f"got {before} in the run and {after} now"):
        check_resume(
            make.config(learner={"zero_stage": before}), make.config(learner={"zero_stage": after})
        )


def test_the_number_of_ranks_may_change_only_if_no_state_is_split_over_them() -> None:
    with pytest.raises(RunDirectoryError, match=r"set learner\.workers=1"):
        check_resume(make.config(), make.config(learner={"workers": 2}))
    check_resume(
        make.config(learner={"zero_stage": 0}), make.config(learner={"zero_stage": 0, "workers": 2})
    )


def test_the_sections_of_generator_pools_may_change() -> None:
    check_resume(
        make.config(), make.config(evaluation={"teacher": {"actors": 3}}, generate={"actors": 2})
    )


def test_an_evaluation_cannot_be_switched_on_on_resume() -> None:
    with pytest.raises(RunDirectoryError, match="not on: the student was not evaluated"):
        check_resume(make.config(evaluation={"at_end": False}), make.config())
    with pytest.raises(
        RunDirectoryError, match=r"evaluation\.max_prompts: absent in the run, 5 now"
    ):
        check_resume(make.config(), make.config(evaluation={"max_prompts": 5}))


def test_both_ends_of_a_range_of_actors_may_change() -> None:
    old = make.config(rollout={"actors": {"min": 2, "max": 16}})
    for actors in (5, {"min": 1, "max": 3}):
        check_resume(old, make.config(rollout={"actors": actors}))
        check_resume(make.config(rollout={"actors": actors}), old)
