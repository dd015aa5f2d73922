"""The target library on a cluster: a run fills it, `score` and another run find all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillm_ray.log.totals import Totals
from tests.integration.tiny import LIMIT_S, NUM_TRAIN, Driver, make_config, records

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(4 * LIMIT_S)]

STEPS, BATCH_SIZE = 6, 8
DATASET_ONLY = ("schedule={type: fixed, phi: 0}", "loss.terms=[{type: forward_kl}]")


def run(log: Path, *arguments: str) -> str:
    with Driver(*arguments, log=log) as driver:
        assert driver.wait(LIMIT_S) == 0, driver.output()
        return driver.output()


def test_a_second_run_with_another_seed_scores_no_token_of_the_data(tmp_path: Path) -> None:
    config = str(make_config(tmp_path, steps=STEPS, batch_size=BATCH_SIZE))
    library = f"targets.library={tmp_path / 'targets'}"
    settings = (*DATASET_ONLY, library, "targets.stores=2")
    log = tmp_path / "log.txt"
    run(log, "train", config, *settings, f"run.directory={tmp_path / 'first'}")
    first = Totals.of(records(tmp_path / "first"))
    assert (first.work.scored_sequences, first.work.library_sequences) == (NUM_TRAIN, 0)

    output = run(log, "score", config, *settings)
    assert f"0 sequences scored, {NUM_TRAIN} were there" in output

    changed = ("run.seed=1", "learner.learning_rate=0.002", "targets.stores=1")
    output = run(log, "train", config, *settings, *changed, f"run.directory={tmp_path / 'second'}")
    second = Totals.of(records(tmp_path / "second"))
    assert (second.work.scored_sequences, second.work.scored_tokens) == (0, 0)
    assert second.work.score_seconds == 0.0
    assert second.work.library_sequences == NUM_TRAIN
    assert second.work.library_tokens == first.work.scored_tokens
    assert (first.target_reuse_sequences, second.target_reuse_sequences) == (0.5, 1.0)
    assert f"{first.work.scored_tokens:,} tokens in {NUM_TRAIN} sequences, which" in output
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    assert summary["teacher_seconds_saved"] == second.work.library_seconds > 0


def test_score_fills_the_library_once(tmp_path: Path) -> None:
    config = str(make_config(tmp_path, steps=STEPS, batch_size=BATCH_SIZE))
    library = tmp_path / "targets"
    log = tmp_path / "log.txt"
    output = run(log, "score", config, *DATASET_ONLY, f"targets.library={library}")
    assert f"{library}: {NUM_TRAIN} sequences scored, 0 were there" in output
    assert f"{NUM_TRAIN} of {NUM_TRAIN} sequences" in output
    assert "bytes, 128 for each of " in output  # 32 hidden values in float32
    (shard,) = library.glob("*/shard-*.safetensors")
    content = shard.read_bytes()
    output = run(log, "score", config, *DATASET_ONLY, f"targets.library={library}")
    assert f"0 sequences scored, {NUM_TRAIN} were there" in output
    assert [path.read_bytes() for path in library.glob("*/shard-*")] == [content]
    assert not (tmp_path / "run").exists()
