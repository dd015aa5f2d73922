"""Runs side by side: sums until each validation, and what makes runs hard to compare."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from distillm_ray.cli import app
from distillm_ray.config.files import dump_config
from distillm_ray.errors import RunDirectoryError
from distillm_ray.evaluation.results import Evaluation, ModelScores, Score
from distillm_ray.log.metrics import MetricsLog
from distillm_ray.log.records import (
    BufferSizes,
    Counters,
    DrawFacts,
    StepRecord,
    ValidationRecord,
)
from distillm_ray.report.comparison import compare, curve, differences
from distillm_ray.report.summary import read_run
from distillm_ray.run_directory import CONFIG_FILE
from distillm_ray.types import Mix, TrainStep
from tests import make


def write_run(directory: Path, *, tokens: int, held_out: int = 50) -> Path:
    """Three steps of 10 s, of which 4 s are waited; a validation after each of them."""
    directory.mkdir()
    log = MetricsLog(directory, commit="", command="", tensorboard=False)
    log.add(ValidationRecord(step=0, loss=4.0, tokens=held_out, phi=0.0))
    for step in (1, 2, 3):
        train = TrainStep(
            step=step,
            loss=1.0,
            loss_by_term={},
            learning_rate=1e-4,
            gradient_norm=1.0,
            tokens=40,
            positions=40,
            seconds=10.0,
            wait_seconds=4.0,
            skipped=False,
        )
        draw = DrawFacts(phi=0.5, psi=0.5, mix=Mix(fresh=1), fresh_ages=(0,), replay_ages=())
        work = Counters(generated_tokens=tokens, generate_seconds=3.0, score_seconds=1.0)
        log.add(StepRecord.build(train, draw, buffer=BufferSizes(), work=work))
        log.add(ValidationRecord(step=step, loss=4.0 - step, tokens=held_out, phi=0.0))
    log.close()
    method = {"method": "gkd"} if tokens else {}
    (directory / CONFIG_FILE).write_text(dump_config(make.config(**method)))
    scores = ModelScores(rouge_l=Score(mean=20.0 + tokens, low=19.0, high=31.5))
    Evaluation(models={"student after": scores}, num_prompts=5, seeds=(1,)).write(directory)
    return directory


def test_what_was_spent_is_summed_until_each_validation(tmp_path: Path) -> None:
    one = curve(read_run(write_run(tmp_path / "a", tokens=7)))
    assert one.losses == (4.0, 3.0, 2.0, 1.0)
    assert one.steps == (0, 1, 2, 3)
    assert one.seconds == (0, 10, 20, 30)
    assert one.generated_tokens == (0, 7, 14, 21)
    assert one.busy_seconds == (0, 10, 20, 30)  # 6 learned, 3 generated, 1 scored


def test_the_command_prints_a_table_and_writes_a_picture(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", tokens=7), write_run(tmp_path / "b", tokens=0)]
    picture = tmp_path / "new" / "c.png"
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(compare(runs, picture))
    rows = [line for line in capture.get().splitlines() if "running" in line]
    first, second = ([cell.strip() for cell in row.strip("│").split("│")] for row in rows)
    assert first == [
        *("a", "gkd", "running", "3", "1.0000", "27.0 [19.0, 31.5]", "-"),
        *("30", "30", "21", "0"),
    ]
    assert second[0:2] == ["b", "-"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "warning" not in capture.get()
    result = CliRunner().invoke(app, ["compare", *map(str, runs), f"--output={picture}"])
    assert result.exit_code == 0, result.output


def test_runs_on_other_rows_come_with_a_warning(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", tokens=7)
    two = write_run(tmp_path / "b", tokens=7, held_out=60)
    found = differences({"a": read_run(one), "b": read_run(two)})
    assert found == ["the runs validate on different rows (tokens: a: 50, b: 60)"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", tokens=7)
    with pytest.raises(RunDirectoryError, match="at least two runs, got 1"):
        compare([one], tmp_path / "c.png")
    with pytest.raises(RunDirectoryError, match="one of them twice"):
        compare([one, tmp_path / "x" / ".." / "a"], tmp_path / "c.png")
    with pytest.raises(RunDirectoryError, match=r"holds no metrics\.jsonl"):
        compare([one, tmp_path], tmp_path / "c.png")
    with pytest.raises(RunDirectoryError, match=r"must be a \.png file"):
        compare([one, tmp_path], tmp_path / "c.pdf")
