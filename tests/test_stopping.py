"""Rules that end a run, decided from the records of its log."""

import math
from pathlib import Path
from typing import Any

import pytest

from distillm_ray.config import Config, StopConfig
from distillm_ray.config.files import dump_config, load_config
from distillm_ray.config.remarks import remarks_on
from distillm_ray.errors import ConfigError, RunDirectoryError
from distillm_ray.learner.checkpoint import CheckpointDirectory, CheckpointMeta
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.records import (
    Counters,
    DoneRecord,
    EventRecord,
    ProbeRecord,
    Record,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.log.stopping import ENDED_EARLY, Standing, has_ended, why_stop
from distillm_ray.preflight import check_run_directory, is_complete, settled
from distillm_ray.types import Validation
from tests import make
from tests.test_fingerprint import START


def validations(*losses: float) -> list[Record]:
    return [ValidationRecord(step=10 * index, loss=loss) for index, loss in enumerate(losses)]


def step(number: int, *, seconds: float = 1.0, generated: int = 0, scored: int = 0) -> StepRecord:
    return StepRecord(
        step=number,
        loss=1.0,
        seconds=seconds,
        work=Counters(generated_tokens=generated, scored_tokens=scored),
    )


@pytest.mark.parametrize(
    ("losses", "best_step", "stale"),
    [
        ((3.0,), 0, 0),
        ((3.0, 2.0, 1.0), 20, 0),
        ((3.0, 3.0), 0, 1),  # as good is no improvement
        ((3.0, 2.0, 2.5, 1.9), 30, 0),
        ((math.nan, 2.0, math.nan), 10, 1),
        ((math.nan, math.nan), 0, 2),
    ],
)
def test_validations_without_an_improvement_are_counted(
    losses: tuple[float, ...], best_step: int, stale: int
) -> None:
    standing = Standing.of(validations(*losses))
    assert (standing.best_step, standing.stale) == (best_step, stale)


def test_an_improvement_below_the_smallest_that_counts_does_not_count() -> None:
    standing = Standing.of(validations(3.0, 2.95, 2.91, 2.85), min_improvement=0.1)
    # 2.95 and 2.91 are within 0.1 of 3.0; 2.85 is not.
    assert (standing.best, standing.best_step, standing.stale) == (2.85, 30, 0)
    slow = Standing.of(validations(3.0, 2.95, 2.91), min_improvement=0.1)
    # The best one is the best, however little it improved.
    assert (slow.best, slow.best_step, slow.stale) == (2.91, 20, 2)
    stop = StopConfig(patience=2, min_improvement=0.1)
    assert why_stop(stop, slow) == (
        "stop.patience: 2 validations without an improvement on 3.0000 by more than 0.1"
    )


def test_rouge_improves_upwards() -> None:
    records = [ProbeRecord(step=at, rouge_l=score) for at, score in ((0, 5.0), (9, 8.0), (18, 7.0))]
    standing = Standing.of([*records, *validations(1.0, 0.5)], metric="rouge_l")
    assert (standing.best, standing.best_step, standing.stale) == (8.0, 9, 1)


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"max_seconds": 5.0}, "stop.max_seconds: 6.0 of 5.0 are spent"),
        ({"max_generated_tokens": 1400}, "stop.max_generated_tokens: 1,400 of 1,400 are spent"),
        ({"max_teacher_tokens": 2000}, "stop.max_teacher_tokens: 2,500 of 2,000 are spent"),
        ({"max_seconds": 6.5, "max_generated_tokens": 1401, "max_teacher_tokens": 2501}, ""),
        ({}, ""),
    ],
)
def test_a_budget_ends_the_run_and_lost_steps_count(rule: dict[str, Any], reason: str) -> None:
    standing = Standing.of(
        [step(1, seconds=2, generated=300, scored=1000), step(2, seconds=1, generated=100)],
        lost=[step(2, seconds=3, generated=1000, scored=1500), *validations(9.0)],
    )
    assert why_stop(StopConfig(**rule), standing) == reason


def run_config(tmp_path: Path, **stop: Any) -> Config:
    return make.config(
        run={"directory": tmp_path}, learner={"steps": 9, "batch_size": 1}, stop=stop
    )


def test_a_run_has_ended_once_the_learners_said_so_and_until_its_budget_is_raised(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    request.addfinalizer(log.close)
    log.add(step(1, generated=100))
    config = run_config(tmp_path, max_generated_tokens=100)
    assert not has_ended(config, 1)  # killed before the model was written
    log.add(EventRecord(step=1, name=ENDED_EARLY))
    assert has_ended(config, 1)
    assert not has_ended(run_config(tmp_path), 1)
    assert not has_ended(run_config(tmp_path, max_generated_tokens=101), 1)
    assert has_ended(run_config(tmp_path), 9)
    log.add(DoneRecord(step=1, status="complete", seconds=1.0))
    assert is_complete(config)
    assert not is_complete(run_config(tmp_path, max_generated_tokens=200))


# ---- epochs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learner", "rows", "steps"),
    [
        ({"epochs": 1}, 100, 10),
        ({"epochs": 2.5}, 100, 25),
        ({"epochs": 1}, 101, 11),  # the last step begins the next epoch
        ({"epochs": 1.1}, 100, 11),  # 1.1 * 100 is above 110 in binary
        ({"epochs": 3, "steps": 7}, 100, 7),
        ({"epochs": 3, "steps": 70}, 100, 30),
        ({"steps": 7}, 100, 7),
    ],
)
def test_epochs_become_steps_when_the_data_is_read(
    learner: dict[str, Any], rows: int, steps: int
) -> None:
    config = make.config(learner={"batch_size": 10, **learner, "steps": learner.get("steps")})
    assert config.with_rows(rows).learner.num_steps == steps
    assert config.with_rows(rows).learner.steps == learner.get("steps")


def test_a_config_without_steps_and_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"learner\.steps or learner\.epochs is required"):
        make.config(learner={"batch_size": 1, "steps": None})


def test_a_warm_up_as_long_as_the_epochs_is_refused() -> None:
    config = make.config(learner={"batch_size": 10, "steps": None, "epochs": 1, "warmup_steps": 10})
    with pytest.raises(ConfigError, match=r"epochs = 1, got 10 >= 10 \(100 rows in batches of 10"):
        config.with_rows(100)


def test_more_epochs_than_can_be_counted_are_refused() -> None:
    config = make.config(learner={"batch_size": 10, "steps": None, "epochs": 1e308})
    with pytest.raises(ConfigError, match=r"learner\.epochs = 1e\+308 are more than"):
        config.with_rows(100)


def test_a_run_of_epochs_knows_its_steps_from_its_saved_config(tmp_path: Path) -> None:
    learner: dict[str, Any] = {"batch_size": 10, "steps": 5, "epochs": 2}

    def resumed(**changes: Any) -> int | None:
        config = make.config(run={"directory": tmp_path}, learner=learner | changes)
        return settled(config, START).learner.known_steps

    assert resumed() is None
    begun = make.config(run={"directory": tmp_path}, learner=learner).with_rows(100)
    (tmp_path / "config.yaml").write_text(dump_config(begun))
    assert resumed() == 5
    assert resumed(steps=None) == 20
    assert resumed(steps=None, epochs=3) == 30
    assert load_config(tmp_path / "config.yaml", ["learner.steps=null"]).learner.num_steps == 20


def test_a_budget_that_was_spent_without_a_checkpoint_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = run_config(tmp_path, max_generated_tokens=50)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    log = MetricsLog(tmp_path, tensorboard=False)
    request.addfinalizer(log.close)
    log.add(step(1, generated=60))
    with pytest.raises(RunDirectoryError, match=r"60 of 50 are spent, by attempts that left no"):
        check_run_directory(config)
    check_run_directory(run_config(tmp_path, max_generated_tokens=61))


def test_an_early_end_that_the_run_went_beyond_is_not_its_end(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = run_config(tmp_path, max_generated_tokens=100)
    log = MetricsLog(tmp_path, tensorboard=False)
    request.addfinalizer(log.close)
    log.add(step(1, generated=100))
    log.add(EventRecord(step=1, name=ENDED_EARLY))
    log.add(DoneRecord(step=1, status="complete", seconds=1.0))
    assert is_complete(config)
    checkpoints = CheckpointDirectory(tmp_path / "checkpoints", keep=2)
    checkpoints.prepare(3)
    checkpoints.commit(CheckpointMeta(step=3, phi=0.0, validation=None), b"")
    assert not is_complete(config)


# ---- the best checkpoint -------------------------------------------------------------------------


def test_a_checkpoint_is_judged_by_a_validation_of_its_own_step_only() -> None:
    old = CheckpointMeta(step=6, phi=0.0, validation=Validation(step=3, loss=1.0, tokens=1))
    own = CheckpointMeta(step=3, phi=0.0, validation=Validation(step=3, loss=1.0, tokens=1))
    bad = CheckpointMeta(step=3, phi=0.0, validation=Validation(step=3, loss=math.nan, tokens=0))
    assert (old.value("loss"), own.value("loss"), bad.value("loss")) == (None, 1.0, None)
    scored = CheckpointMeta(step=3, phi=0.0, validation=None, rouge_l=40.0)
    assert (scored.value("loss"), scored.value("rouge_l")) == (None, -40.0)
    assert CheckpointMeta.from_json(scored.to_json()) == scored


# ---- keys without effect -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"schedule": {"type": "fixed"}, "stop": {"max_generated_tokens": 9}}, "stop.max_gen"),
        (
            {
                "schedule": {"type": "fixed"},
                "loss": {"terms": [{"type": "cross_entropy"}]},
                "stop": {"max_teacher_tokens": 9},
            },
            "stop.max_teacher_tokens",
        ),
        (
            {"loss": {"terms": [{"type": "skew_kl", "curriculum": True}]}},  # ten steps, as the run
            "loss.terms.0.curriculum",
        ),
    ],
)
def test_a_key_without_effect_is_told(tree: dict[str, Any], key: str) -> None:
    (remark,) = remarks_on(make.config(**tree))
    assert remark.startswith(f"warning: {key}") and " has no effect: " in remark
    assert remarks_on(make.config()) == ()
