"""Sums over the steps of a run, and target reuse, against numbers computed by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from distillm_ray.log.metrics import FILE_NAME, MetricsLog, read_records
from distillm_ray.log.records import (
    BufferSizes,
    Counters,
    PublishRecord,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.log.totals import Totals
from distillm_ray.types import Mix


def step_record(step: int, *, tokens: int = 100, scored: tuple[int, int] = (0, 0)) -> StepRecord:
    """Four sequences trained on; `scored`: sequences and positions the teacher computed."""
    return StepRecord(
        step=step,
        loss=1.0,
        tokens=tokens,
        positions=tokens + 10,
        seconds=2.0,
        wait_seconds=0.5,
        skipped=step == 2,
        infinite_tokens=3,
        mix=Mix(fresh=1, replay=1, dataset=2),
        work=Counters(scored_sequences=scored[0], scored_tokens=scored[1], generate_seconds=0.25),
    )


def test_totals_are_sums_over_steps_and_counts_of_events() -> None:
    totals = Totals.of(
        [
            ValidationRecord(step=0, loss=3.0, tokens=999),
            step_record(1, scored=(4, 100)),
            PublishRecord(step=1),
            step_record(2, tokens=50),
        ]
    )
    assert totals == Totals(
        steps=2,
        last_step=2,
        skipped_steps=1,
        tokens=150,
        positions=170,
        infinite_tokens=6,
        learn_seconds=3.0,
        wait_seconds=1.0,
        publishes=1,
        mix=Mix(fresh=2, replay=2, dataset=4),
        work=Counters(scored_sequences=4, scored_tokens=100, generate_seconds=0.5),
        has_targets=True,
    )


def test_target_reuse_is_one_minus_scored_by_trained_on() -> None:
    totals = Totals.of([step_record(1, scored=(4, 120)), step_record(2, scored=(1, 20))])
    assert totals.target_reuse_sequences == pytest.approx(1 - 5 / 8)
    assert totals.target_reuse_tokens == pytest.approx(1 - 140 / 200)


def test_what_no_term_compares_with_the_teacher_does_not_count_as_reuse() -> None:
    plain = dataclasses.replace(
        step_record(1, scored=(2, 60)),
        mix=Mix(fresh=1, replay=1, dataset=2, corpus=4),
        untargeted_sequences=4,
        untargeted_tokens=40,
    )
    totals = Totals.of([plain, plain])
    assert totals.mix == Mix(fresh=2, replay=2, dataset=4, corpus=8)
    assert totals.target_reuse_sequences == 1 - 4 / 8  # of 16 sequences, 8 without the teacher
    assert totals.target_reuse_tokens == 0.0  # 120 tokens scored, 200 - 80 compared


def test_targets_that_are_scored_just_in_time_are_not_reused() -> None:
    totals = Totals.of([step_record(step, scored=(4, 100)) for step in (1, 2, 3)])
    assert (totals.target_reuse_sequences, totals.target_reuse_tokens) == (0.0, 0.0)


def test_scoring_again_after_evictions_makes_the_reuse_negative() -> None:
    totals = Totals.of([step_record(1, scored=(6, 130))])
    assert totals.target_reuse_sequences == pytest.approx(-0.5)
    assert totals.target_reuse_tokens == pytest.approx(-0.3)


def test_a_run_without_a_teacher_has_no_target_reuse() -> None:
    totals = Totals.of([step_record(1), step_record(2)])
    assert math.isnan(totals.target_reuse_sequences)
    assert math.isnan(totals.target_reuse_tokens)


def test_a_run_that_finds_all_of_its_targets_reuses_everything() -> None:
    held = BufferSizes(target_bytes=1)
    totals = Totals.of([dataclasses.replace(step_record(1), buffer=held)])
    assert (totals.target_reuse_sequences, totals.target_reuse_tokens) == (1.0, 1.0)


def test_there_is_no_target_reuse_before_the_first_step() -> None:
    assert math.isnan(Totals().target_reuse_sequences)


def test_superseded_steps_are_not_summed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in range(1, 6):
        log.add(step_record(step, tokens=1000))
    log.rewind(2)
    log.add(step_record(3, tokens=10))
    log.close()
    totals = Totals.of(read_records(tmp_path / FILE_NAME))
    assert (totals.steps, totals.last_step, totals.tokens) == (3, 3, 2010)
