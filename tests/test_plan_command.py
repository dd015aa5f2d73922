"""`distillm-ray plan` with stage times from a file: no model is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distillm_ray.cli import EXIT_USER_ERROR, app
from distillm_ray.plan.stages import (
    GenerationTimes,
    LearningTimes,
    ScoringTimes,
    Stages,
    write_stages,
)
from tests.integration.tiny import make_config

STAGES = Stages(
    device="cpu",
    cores=4,
    learning=LearningTimes(
        step=1.0, row=0, token=0, loss_token=0, validation_token=0, gather=0, checkpoint=0
    ),
    generation=GenerationTimes(
        engine_step=0.0, token=0.5, prompt_token=0.0, load=0.0, response_tokens=(4,)
    ),
    scoring=ScoringTimes(batch=0.01, token=0.0),
)
PHI = "schedule={type: fixed, phi: 0.5, replay_ratio: none}"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("tiny"), steps=20, batch_size=4)


@pytest.fixture
def stages(tmp_path: Path) -> Path:
    path = tmp_path / "stages.json"
    write_stages(path, STAGES)
    return path


def plan(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["plan", *(str(one) for one in arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def planned(*arguments: object) -> dict[str, Any]:
    return json.loads(plan(*arguments, "--json"))


def test_every_phi_has_a_row_that_says_what_a_step_takes(job: Path, stages: Path) -> None:
    found = planned(job, PHI, "--stages", stages)
    rows = {row["phi"]: row for row in found["rows"]}
    assert list(rows) == [0.0, 0.1, 0.2, 0.5, 1.0]
    assert rows[0.0]["limiting"] == "learner"
    assert rows[0.0]["generated_sequences_per_step"] == 0
    # Four responses of four tokens at half a second each.
    assert rows[1.0]["generated_sequences_per_step"] == 4
    assert rows[1.0]["seconds_per_step"] == pytest.approx(8.0, rel=0.2)
    assert rows[1.0]["limiting"] == "generator"


def test_the_advice_adds_generators_until_the_learner_does_not_wait(
    job: Path, stages: Path
) -> None:
    arguments = (job, PHI, "--stages", stages, "rollout.num_cpus=1", "--phi", "1", "--cpus", "64")
    advice = planned(*arguments)["advice"]
    assert advice["counts"]["generators"] > 2
    assert advice["seconds_per_step"] < 4.0
    assert f"rollout.actors={advice['counts']['generators']}" in advice["overrides"]
    assert advice["cpus"] <= 64


def test_the_table_names_unit_roles_and_overrides(job: Path, stages: Path) -> None:
    text = plan(job, PHI, "--stages", stages, "--cpus", "64", "--phi", "1")
    for part in ("CPU-s/step", "waits for data", "generator busy", "limited by", "Overrides: "):
        assert part in text


def test_a_run_of_one_kind_of_text_has_one_row(job: Path, stages: Path) -> None:
    found = planned(job, "method=kd", "--stages", stages)
    assert [row["phi"] for row in found["rows"]] == [0.0]
    assert found["counts"]["generators"] == 0
    found = planned(job, "method=opd", "--stages", stages)
    assert [row["phi"] for row in found["rows"]] == [1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--cpus", "0"), "--cpus must be above 0, got 0"),
        (("method=kd", "--phi", "0.5"), "--phi must be 0 with this schedule, got 0.5"),
        (("learner.stepz=5",), "learner.stepz"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    job: Path, stages: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = CliRunner().invoke(app, ["plan", str(job), "--stages", str(stages), *arguments])
    assert result.exit_code == EXIT_USER_ERROR
    assert message in result.stderr


def test_stage_times_without_a_stage_of_the_run_are_refused(job: Path, tmp_path: Path) -> None:
    path = tmp_path / "stages.json"
    write_stages(path, dataclasses.replace(STAGES, scoring=None))
    result = CliRunner().invoke(app, ["plan", str(job), "--stages", str(path)])
    assert result.exit_code == EXIT_USER_ERROR
    assert "the file must have the times of scoring" in result.stderr
