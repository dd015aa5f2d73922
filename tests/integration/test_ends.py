"""How a job ends before or without its training: exit codes, messages, and what is left."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from distillm_ray.log.records import DoneRecord, StepRecord
from tests.integration.tiny import (
    LIMIT_S,
    Driver,
    make_config,
    make_rows,
    marked_processes,
    records,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(3 * LIMIT_S)]

STEPS = 4
BEFORE = "evaluating the student before training"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("ends"), steps=STEPS, batch_size=4)


def test_a_stop_during_the_evaluation_before_training_ends_it_and_the_same_command_completes(
    config: Path,
) -> None:
    """The evaluation is long: three thousand prompts, one after the other."""
    run, test_set = config.parent / "stopped", config.parent / "test.jsonl"
    make_rows(test_set, 3000, start=0)
    command = ("train", str(config), f"run.directory={run}", f"data.test=[{test_set}]")
    long = ("evaluation.at_end=true", "rollout.engine.max_batch_size=1")
    with Driver(*command, *long, log=config.parent / "stopped.log") as driver:
        driver.wait_for(lambda: BEFORE in driver.output(), LIMIT_S)
        driver.send(signal.SIGTERM)
        assert driver.wait(LIMIT_S) == 3, driver.output()
        assert "the same command" in driver.output()
        assert "step 1/" not in driver.output()
    assert not (run / "evaluation.json").exists(), "the evaluation was not finished"
    assert records(run, StepRecord) == []

    short = ("evaluation.at_end=false",)
    with Driver(*command, *short, log=config.parent / "completed.log") as driver:
        assert driver.wait(LIMIT_S) == 0, driver.output()
    assert [record.step for record in records(run, StepRecord)] == list(range(1, STEPS + 1))
    assert [record.status for record in records(run, DoneRecord)] == ["complete"]


def test_an_error_of_a_rank_before_training_ends_the_job_with_its_message(config: Path) -> None:
    run, log = config.parent / "refused", config.parent / "refused.log"
    command = ("train", str(config), f"run.directory={run}")
    wrong = ("student.dtype=bfloat16", "learner.zero_stage=0")
    with Driver(*command, *wrong, log=log) as driver:
        assert driver.wait(LIMIT_S) == 2, driver.output()
        assert "zero_stage" in driver.output()
        assert "Traceback" not in driver.output()
        roles = [one.title for one in marked_processes(driver.mark) if "Actor" in one.title]
        assert roles == []


def test_a_run_of_plain_sft_names_no_teacher_and_starts_none(config: Path, tmp_path: Path) -> None:
    text = config.read_text(encoding="utf-8")
    lines = text.splitlines(keepends=True)
    start = next(index for index, line in enumerate(lines) if line.startswith("teacher:"))
    end = next(index for index in range(start + 1, len(lines)) if not lines[index].startswith(" "))
    sft = tmp_path / "sft.yaml"
    sft.write_text("".join([*lines[:start], *lines[end:]]), encoding="utf-8")
    run = tmp_path / "run"
    command = ("train", str(sft), f"run.directory={run}", "schedule.phi=0")
    terms = "loss.terms=[{on: dataset, type: cross_entropy}]"
    with Driver(*command, terms, "evaluation.at_end=false", log=tmp_path / "log") as driver:
        driver.wait_for(lambda: bool(records(run, StepRecord)), LIMIT_S)
        titles = " ".join(one.title for one in marked_processes(driver.mark))
        assert driver.wait(LIMIT_S) == 0, driver.output()
    assert "RayTrainWorker" in titles
    assert "ScorerActor" not in titles
    assert "GeneratorActor" not in titles
    steps = records(run, StepRecord)
    assert [record.step for record in steps] == list(range(1, STEPS + 1))
    assert {record.mix.dataset for record in steps} == {4}
    assert all(record.work.scored_sequences == 0 for record in steps)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "complete"


def test_an_evaluation_that_fails_after_training_costs_the_evaluation_only(
    config: Path, tmp_path: Path
) -> None:
    """The teacher's weights go away while it is used; the same command scores it alone."""
    run, log = config.parent / "unscored", config.parent / "unscored.log"
    teacher = tmp_path / "teacher"
    shutil.copytree(config.parent / "teacher", teacher)
    weights, away = teacher / "model.safetensors", teacher / "away"
    command = (
        *("train", str(config), f"run.directory={run}", f"teacher.model={teacher}"),
        *("evaluation.at_end=true", "run.startup_timeout_s=60"),
    )
    with Driver(*command, log=log) as driver:
        driver.wait_for(lambda: bool(records(run, StepRecord)), LIMIT_S)
        weights.rename(away)
        assert driver.wait(LIMIT_S) == 0, driver.output()
        said = " ".join(driver.output().split())
        assert "the evaluation of the teacher failed" in said
        assert "but the evaluation of teacher is missing" in said
    away.rename(weights)
    assert [record.status for record in records(run, DoneRecord)] == ["complete"]
    assert (run / "model" / "model.safetensors").is_file()
    first = json.loads((run / "evaluation.json").read_text())["models"]
    assert set(first) == {"student before", "student after"}

    with Driver(*command, log=config.parent / "scored.log") as driver:
        assert driver.wait(LIMIT_S) == 0, driver.output()
        assert "The evaluation of teacher is missing." in driver.output()
        assert f"step {STEPS}/" not in driver.output()
    second = json.loads((run / "evaluation.json").read_text())["models"]
    assert set(second) == {"student before", "student after", "teacher"}
    assert second["student after"] == first["student after"]
    kept = {path.stem for path in (run / "responses").iterdir()}
    assert kept == {"student_before", "student_after", "teacher"}


def test_a_budget_ends_the_run_and_a_raised_one_goes_on_to_another_student(config: Path) -> None:
    run = config.parent / "budget"
    command = ("train", str(config), f"run.directory={run}")
    scored = ("evaluation.at_end=true", "evaluation.seeds=[1]", "evaluation.teacher=null")

    def trained_steps() -> int:
        evaluation = json.loads((run / "evaluation.json").read_text())
        assert list(evaluation["models"]) == ["student before", "student after"]
        return evaluation["trained_steps"]

    for budget, last in (("1", False), ("null", True)):
        arguments = (*command, *scored, f"stop.max_teacher_tokens={budget}")
        with Driver(*arguments, log=config.parent / f"budget-{budget}.log") as driver:
            assert driver.wait(2 * LIMIT_S) == 0, driver.output()
        done = records(run, DoneRecord)[-1]
        assert (done.status, done.step == STEPS) == ("complete", last)
        assert trained_steps() == done.step
        with Driver(*arguments, log=config.parent / "again.log") as driver:
            assert driver.wait(LIMIT_S) == 0, driver.output()
            assert "is complete" in driver.output()
    output = config.parent / "exported"
    export = ("export", str(run), "--checkpoint", "latest", "--output", str(output))
    with Driver(*export, log=config.parent / "export.log") as driver:
        assert driver.wait(LIMIT_S) == 0, driver.output()
        assert f"the student after step {STEPS}" in driver.output()
    same = sorted(path.name for path in output.iterdir())
    assert same == sorted(path.name for path in (run / "model").iterdir())
    for name in same:
        assert (output / name).read_bytes() == (run / "model" / name).read_bytes(), name
