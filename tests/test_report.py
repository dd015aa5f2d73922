"""Summaries, the table and the figures of a run, from a synthetic log."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console, RenderableType

from distillm_ray.errors import RunDirectoryError
from distillm_ray.evaluation.results import (
    ComparedSample,
    Evaluation,
    ModelScores,
    Score,
    has_trained_student,
)
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.records import (
    ActorCounts,
    BufferSizes,
    Counters,
    DoneRecord,
    DrawFacts,
    PublishRecord,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.report.plots import (
    draw_actors,
    draw_all,
    draw_overview,
    draw_phi,
    running_mean,
)
from distillm_ray.report.report import render_report, write_report, write_samples
from distillm_ray.report.summary import read_run, summarize
from distillm_ray.types import Mix, TrainStep

NUM_STEPS, BATCH = 200, 16


class Clock:
    """A clock that advances by two seconds at every reading."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def write_run(
    directory: Path, *, num_steps: int = NUM_STEPS, start: float = 0.3, corpus: int = 0
) -> None:
    """The log of a synthetic run: losses fall, phi rises twice, the replay shelf fills up.

    Every step adds `corpus` sequences, which the teacher does not score.
    """
    random = np.random.default_rng(0)
    log = MetricsLog(
        directory,
        commit="0123456ab",
        command="distillm-ray train configs/quickstart.yaml",
        tensorboard=False,
        clock=Clock(),
    )
    phi, shelf = start, 0
    log.add(ValidationRecord(step=0, loss=3.4, tokens=1000, phi=phi))
    for step in range(1, num_steps + 1):
        psi = phi * (1 - (step - 1) / num_steps)
        slots = random.random(BATCH)
        fresh = int((slots < psi).sum())
        replay = int(((slots >= psi) & (slots < phi)).sum())
        if shelf < BATCH:
            fresh, replay = fresh + replay, 0
        shelf = min(shelf + fresh, 1000)
        train = TrainStep(
            step=step,
            loss=2.0 * math.exp(-step / 60) + 0.4 + 0.1 * float(random.standard_normal()),
            loss_by_term={"skew_kl on all": math.exp(-step / 60), "cross_entropy on dataset": 0.4},
            learning_rate=1e-4,
            gradient_norm=1.0,
            tokens=4000,
            positions=4100,
            seconds=2.0,
            wait_seconds=0.25 if fresh else 0.0,
            skipped=step == 50,
        )
        draw = DrawFacts(
            phi=phi,
            psi=psi,
            mix=Mix(fresh=fresh, replay=replay, dataset=BATCH - fresh - replay, corpus=corpus),
            untargeted_sequences=corpus,
            untargeted_tokens=100 * corpus,
            fresh_ages=tuple(random.integers(0, 2, fresh).tolist()),
            replay_ages=tuple(random.integers(1, step + 1, replay).tolist()),
        )
        work = Counters(
            generated_sequences=fresh,
            generated_tokens=100 * fresh,
            scored_sequences=fresh + 1,
            scored_tokens=150 * fresh + 100,
            generate_seconds=0.5,
            score_seconds=0.125,
        )
        sizes = BufferSizes(replay=shelf, in_flight=2 * fresh, fresh=fresh // 2)
        log.add(StepRecord.build(train, draw, buffer=sizes, work=work))
        if step % 10 == 0 and psi > 0:
            log.add(PublishRecord(step=step, nbytes=10**8, seconds=0.5))
        if step % 25 == 0:
            phi = phi if phi == 0 else min(phi + (0.1 if step in (100, 150) else 0.0), 1.0)
            loss = 3.4 * math.exp(-step / 80) + 1.2
            log.add(ValidationRecord(step=step, loss=loss, tokens=1000, phi=phi))
    log.add(DoneRecord(step=num_steps, status="complete", seconds=400.0))
    log.close()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "quickstart"
    write_run(directory, num_steps=60)
    scores = {
        "student before": ModelScores(validation_loss=3.4, rouge_l=Score(mean=8.21, std=0.42)),
        "student after": ModelScores(
            validation_loss=1.25, rouge_l=Score(mean=28.0), bleu=Score(mean=4.4)
        ),
        "teacher": ModelScores(validation_loss=0.5, rouge_l=Score(mean=40.0)),
    }
    sample = ComparedSample(prompt="Why?", reference="So.", before="", after="Because\nof it.")
    Evaluation(models=scores, samples=(sample,), num_prompts=50, seeds=(1, 2)).write(directory)
    return directory


def printed(renderable: RenderableType) -> str:
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_a_corpus_changes_neither_the_share_of_the_student_nor_target_reuse(
    finished: Path, tmp_path: Path
) -> None:
    write_run(tmp_path, num_steps=60, corpus=BATCH)
    runs = read_run(finished), read_run(tmp_path)
    plain, summary = map(summarize, runs)
    assert summary.totals.mix.corpus == 60 * BATCH
    assert summary.student_share == plain.student_share
    assert summary.target_reuse_sequences == plain.target_reuse_sequences
    scored = plain.totals.work.scored_tokens
    assert summary.target_reuse_tokens == pytest.approx(1 - scored / (60 * (4000 - 100 * BATCH)))
    text = " ".join(printed(render_report(runs[1], summary, {})).split())
    assert "data-set sequences, 960 of the corpus" in text
    assert "of the tokens trained on with targets" in text
    assert "corpus" not in printed(render_report(runs[0], plain, {}))


def test_the_summary_adds_up_the_log(finished: Path) -> None:
    run = read_run(finished)
    summary = summarize(run)
    steps = [record for record in run.records if isinstance(record, StepRecord)]
    drawn = np.array([[r.mix.fresh, r.mix.replay, r.mix.dataset] for r in steps]).sum(axis=0)
    assert summary.status == "complete"
    mix = summary.totals.mix
    assert (mix.fresh, mix.replay, mix.dataset) == tuple(drawn)
    assert drawn.sum() == 60 * BATCH
    assert summary.student_share == pytest.approx((drawn[0] + drawn[1]) / (60 * BATCH))
    assert summary.totals.work.generated_tokens == 100 * drawn[0]
    scored_sequences, scored_tokens = drawn[0] + 60, 150 * drawn[0] + 100 * 60
    assert summary.target_reuse_sequences == pytest.approx(1 - scored_sequences / (60 * BATCH))
    assert summary.target_reuse_tokens == pytest.approx(1 - scored_tokens / (60 * 4000))
    assert summary.packing_efficiency == pytest.approx(40 / 41)
    waited = 0.25 * sum(r.mix.fresh > 0 for r in steps)
    assert summary.totals.wait_seconds == pytest.approx(waited)
    assert summary.totals.learn_seconds == pytest.approx(120 - waited)
    assert summary.totals.work.generate_seconds == pytest.approx(30)
    assert summary.first_validation_loss == 3.4
    assert summary.last_validation_loss == pytest.approx(3.4 * math.exp(-50 / 80) + 1.2)
    assert summary.totals.skipped_steps == 1
    assert summary.wall_seconds == 2.0 * (len(run.records) - 1)


def test_the_mean_age_is_over_fresh_samples_not_over_steps(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for step, ages in ((1, (0, 0, 0)), (2, (4,)), (3, ())):
        draw = DrawFacts(phi=1.0, psi=1.0, mix=Mix(fresh=len(ages)), fresh_ages=ages)
        train = TrainStep(step=step, loss=1.0)
        log.add(StepRecord.build(train, draw, buffer=BufferSizes(), work=Counters()))
    log.close()
    summary = summarize(read_run(tmp_path))
    assert (summary.fresh_age_mean, summary.fresh_age_max) == (1.0, 4)
    assert summary.status == "running"


def test_the_report_writes_summary_samples_and_figures(finished: Path) -> None:
    text = printed(write_report(finished))
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["totals"]["steps"] == 60
    assert summary["commit"] == "0123456ab"
    names = {path.stem for path in (finished / "plots").glob("*.png")}
    panels = {"loss", "phi", "mix", "age", "buffer", "actors", "seconds", "work"}
    assert names == {"overview", *panels}
    samples = (finished / "samples.md").read_text()
    assert "> Because\n> of it." in samples
    assert "**Before**\n\n> (empty)" in samples
    rows = [[cell.strip() for cell in row.split("│")] for row in text.splitlines()]
    assert ["", "student before", "3.400", "8.2 ± 0.4", "-", ""] in rows
    assert ["", "student after", "1.250", "28.0", "4.4", ""] in rows
    assert ["", "teacher", "0.500", "40.0", "-", ""] in rows
    for word in ("generating", "scoring", "learning", "waiting", "wall-clock"):
        assert word in text
    assert "1 steps were skipped" in text
    reuse = [100 * summary[f"target_reuse_{unit}"] for unit in ("sequences", "tokens")]
    expected = f"target reuse: {reuse[0]:.1f} % of the sequences, {reuse[1]:.1f} % of the tokens"
    assert expected in text


def test_the_report_says_what_the_library_has_saved(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for step, found in ((1, 4), (2, 0)):
        draw = DrawFacts(phi=0.0, psi=0.0, mix=Mix(dataset=4))
        work = Counters(
            library_sequences=found, library_tokens=300 * found, library_seconds=1.25 * found
        )
        train = TrainStep(step=step, loss=1.0, tokens=1200)
        sizes = BufferSizes(target_bytes=1000)
        log.add(StepRecord.build(train, draw, buffer=sizes, work=work))
    log.close()
    text = printed(write_report(tmp_path))
    assert "0 tokens in 0 sequences" in text
    assert "target reuse: 100.0 % of the sequences, 100.0 % of the tokens" in text
    expected = (
        "from the library: 1,200 tokens in 4 sequences, which the teacher once computed in 5.0 s"
    )
    assert expected in " ".join(text.split())
    assert json.loads((tmp_path / "summary.json").read_text())["teacher_seconds_saved"] == 5.0


def test_a_run_without_a_teacher_reports_no_target_reuse(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    draw = DrawFacts(phi=0.0, psi=0.0, mix=Mix(dataset=4))
    train = TrainStep(step=1, loss=1.0, tokens=100)
    log.add(StepRecord.build(train, draw, buffer=BufferSizes(), work=Counters()))
    log.close()
    text = printed(write_report(tmp_path))
    assert "no teacher targets" in text and "reuse" not in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["target_reuse_sequences"] is None
    assert summary["target_reuse_tokens"] is None


def test_another_run_becomes_a_row_of_the_table(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "sft"
    other.mkdir()
    after = ModelScores(validation_loss=1.5, rouge_l=Score(mean=21.0))
    Evaluation(models={"student after": after}).write(other)
    text = printed(write_report(finished, compare=[other]))
    row = next(line for line in text.splitlines() if "student after (sft)" in line)
    assert "1.500" in row and "21.0" in row


def test_a_run_to_compare_with_needs_an_evaluation(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"holds no evaluation\.json .*at_end"):
        write_report(finished, compare=[tmp_path])


def test_a_neighbouring_run_is_compared_with_after_its_student_is_trained(
    finished: Path, tmp_path: Path
) -> None:
    assert has_trained_student(finished)
    assert not has_trained_student(tmp_path)
    Evaluation(models={"student before": ModelScores()}).write(tmp_path)
    assert not has_trained_student(tmp_path)
    (tmp_path / "evaluation.json").write_text('{"models": 3}')
    assert not has_trained_student(tmp_path)


def test_a_directory_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"holds no metrics\.jsonl"):
        read_run(tmp_path)


def test_a_damaged_evaluation_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, num_steps=2)
    (tmp_path / "evaluation.json").write_text('{"models": 3}')
    with pytest.raises(RunDirectoryError, match=r"is not a valid evaluation .* delete it"):
        read_run(tmp_path)


def test_an_evaluation_is_read_back_as_it_was_written(finished: Path) -> None:
    evaluation = read_run(finished).evaluation
    assert evaluation is not None
    assert evaluation.models["student before"].rouge_l == Score(mean=8.21, std=0.42)
    assert evaluation.models["student before"].bleu is None
    assert evaluation.seeds == (1, 2)


def test_a_run_that_never_drew_an_sgo_is_reported_as_such(tmp_path: Path) -> None:
    write_run(tmp_path, num_steps=5, start=0.0)
    run = read_run(tmp_path)
    assert "never drew a student-generated output" in summarize(run).notes[0]
    assert "schedule.start" in " ".join(printed(render_report(run, summarize(run))).split())


def test_a_run_without_a_step_can_be_reported(tmp_path: Path) -> None:
    MetricsLog(tmp_path, tensorboard=False).close()
    assert "0 steps, running" in printed(write_report(tmp_path))


def test_the_overview_is_1200_pixels_wide(finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "overview.png"
    draw_overview(read_run(finished).records, path, title="command", subtitle="commit abc")
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(header[16:20], "big") == 1200


def test_all_panels_are_drawn(finished: Path, tmp_path: Path) -> None:
    paths = draw_all(read_run(finished).records, tmp_path)
    assert all(path.stat().st_size > 5000 for path in paths)


def test_the_running_mean_ignores_values_that_were_not_measured() -> None:
    values = [math.nan, 2.0, 4.0, math.nan, math.inf, 6.0]
    means = running_mean(values, 2)
    assert np.isnan(means[0]) and np.isnan(means[4])
    assert means[[1, 2, 3, 5]].tolist() == [2.0, 3.0, 4.0, 6.0]


def test_samples_cannot_end_their_quoted_block(tmp_path: Path) -> None:
    text = "# Title\n\n```\nend"
    sample = ComparedSample(prompt=text, reference="r", before="b", after="a")
    write_samples(tmp_path / "samples.md", [sample])
    written = (tmp_path / "samples.md").read_text()
    assert "> # Title\n> \n> ```\n> end" in written


def test_the_members_of_elastic_pools_over_time_are_in_summary_and_picture(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    draw = DrawFacts(phi=1.0, psi=0.5, mix=Mix(fresh=1))
    for step, generators in enumerate((1, 2, 3, 2), start=1):
        log.add(
            StepRecord.build(
                TrainStep(step=step, loss=1.0),
                draw,
                buffer=BufferSizes(),
                work=Counters(),
                actors=ActorCounts(generators=generators, generators_starting=1, scorers=1),
            )
        )
    log.close()
    run = read_run(tmp_path)
    summary = summarize(run)
    assert (summary.generators_mean, summary.generators_max) == (2.0, 3)
    assert (summary.scorers_mean, summary.scorers_max) == (1.0, 1)
    ax = Figure().subplots()
    draw_phi(ax, run.records)
    (right,) = [one for one in ax.figure.axes if one is not ax]
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in right.lines}
    assert drawn == {"generators (right)": [1, 2, 3, 2], "scorers (right)": [1, 1, 1, 1]}
    ax = Figure().subplots()
    draw_actors(ax, run.records)
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in ax.lines}
    assert drawn["generators"] == [1, 2, 3, 2] and drawn["starting, of both"] == [1, 1, 1, 1]


def test_pools_of_a_fixed_size_leave_the_picture_of_the_schedule_as_it_was(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    for step in (1, 2):
        log.add(
            StepRecord.build(
                TrainStep(step=step, loss=1.0),
                DrawFacts(phi=1.0, psi=0.5, mix=Mix(fresh=1)),
                buffer=BufferSizes(),
                work=Counters(),
                actors=ActorCounts(generators=4, scorers=2),
            )
        )
    log.close()
    ax = Figure().subplots()
    draw_phi(ax, read_run(tmp_path).records)
    assert len(ax.figure.axes) == 1
