"""Which keys may change when a run goes on."""

from pathlib import Path
from typing import Any

import pytest

from distillm_ray.config import Config
from distillm_ray.errors import RunDirectoryError
from distillm_ray.learner.resume import check_resume


def make_config(**changes: Any) -> Config:
    """A small config; `changes` are dotted keys with `__` for the dots."""
    tree: dict[str, Any] = {
        "run": {"directory": Path("/runs/a")},
        "teacher": {"model": Path("/m/teacher")},
        "student": {"model": Path("/m/student")},
        "data": {"train": [Path("/d/a.jsonl")]},
        "learner": {"steps": 100, "batch_size": 8},
    }
    for key, value in changes.items():
        *sections, name = key.split("__")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    return Config.model_validate(tree)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"learner__learning_rate": 3e-4},
        {"learner__steps": 200, "rollout__actors": 4, "teacher__actors": 2},
        {"schedule": {"type": "adaptive", "increment": 0.2, "tolerance": 0.01}},
        {"run__directory": Path("/elsewhere/a")},
        {"rollout__engine": {"type": "transformers"}},
        {"checkpoint__interval": 7, "evaluation__at_end": False},
        {"learner__zero_stage": 2},
    ],
)
def test_resources_thresholds_and_length_may_change(changes: dict[str, Any]) -> None:
    check_resume(make_config(), make_config(**changes))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"run__seed": 1}, "run.seed: 0 in the run, 1 now"),
        (
            {"teacher__model": Path("/m/other")},
            "teacher.model: '/m/teacher' in the run, '/m/other' now",
        ),
        ({"learner__batch_size": 16}, "learner.batch_size: 8 in the run, 16 now"),
        ({"loss__temperature": 2.0}, "loss.temperature: 1.0 in the run, 2.0 now"),
        (
            {"data__train": [Path("/d/b.jsonl")]},
            "data.train: ['/d/a.jsonl'] in the run, ['/d/b.jsonl']",
        ),
        ({"schedule": {"type": "fixed"}}, "schedule: {'type': 'adaptive', "),
        ({"student__lora": {"rank": 4}}, "student.lora: absent in the run, {'rank': 4, "),
        ({"validation__interval": 5}, "validation.interval: 100 in the run, 5 now"),
    ],
)
def test_what_the_run_is_may_not_change(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(RunDirectoryError) as caught:
        check_resume(make_config(), make_config(**changes))
    assert line in str(caught.value)
    assert "run.directory" in str(caught.value)


def test_all_fixed_keys_that_differ_are_named_at_once() -> None:
    with pytest.raises(RunDirectoryError) as caught:
        check_resume(make_config(), make_config(run__seed=1, learner__batch_size=16))
    assert "run.seed" in str(caught.value)
    assert "learner.batch_size" in str(caught.value)


@pytest.mark.parametrize(("before", "after"), [(0, 1), (2, 3), (3, 2), (1, 0), (3, 0)])
def test_zero_stages_that_deepspeed_cannot_load_are_refused_by_name(
    before: int, after: int
) -> None:
    with pytest.raises(RunDirectoryError, match=f"got {before} in the run and {after} now"):
        check_resume(
            make_config(learner__zero_stage=before), make_config(learner__zero_stage=after)
        )


def test_the_number_of_ranks_may_change_only_where_nothing_is_split() -> None:
    with pytest.raises(RunDirectoryError, match=r"set learner\.workers=1"):
        check_resume(make_config(), make_config(learner__workers=2))
    check_resume(
        make_config(learner__zero_stage=0), make_config(learner__zero_stage=0, learner__workers=2)
    )


def test_a_section_of_pools_may_change_as_a_whole() -> None:
    check_resume(
        make_config(), make_config(evaluation__teacher={"actors": 3}, generate={"actors": 2})
    )


def test_an_evaluation_that_did_not_begin_cannot_be_asked_for_on_resume() -> None:
    with pytest.raises(RunDirectoryError, match="not on: the student was not evaluated"):
        check_resume(make_config(evaluation__at_end=False), make_config())
    with pytest.raises(
        RunDirectoryError, match=r"evaluation\.max_prompts: absent in the run, 5 now"
    ):
        check_resume(make_config(), make_config(evaluation__max_prompts=5))
