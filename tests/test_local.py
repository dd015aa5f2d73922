"""`run.mode=local` on tiny models: what it refuses, and what it does not compute twice."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from distillm_ray import local, preflight
from distillm_ray.cli import EXIT_USER_ERROR, app
from distillm_ray.config import Config
from distillm_ray.config.files import dump_config, load_config
from distillm_ray.errors import ConfigError, RunDirectoryError, UserError
from distillm_ray.log.records import DoneRecord, StepRecord, ValidationRecord
from distillm_ray.log.totals import Totals
from distillm_ray.report.console import ConsoleView
from distillm_ray.report.rows import ROWS_FILE
from distillm_ray.run_directory import MODEL_FOLDER
from distillm_ray.teacher.target_store import TargetStore
from distillm_ray.types import TeacherTargets
from tests.integration.tiny import NUM_TRAIN, make_config, make_corpus, make_rows, records
from tests.object_store import BUCKET, ObjectStore

STEPS, BATCH_SIZE = 4, 8
DATASET_ONLY = ("schedule={type: fixed, phi: 0}", "loss.terms=[{type: forward_kl}]")
TWO_EPOCHS = ("learner.steps=6",)
Load = Callable[..., Config]


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("local"), steps=STEPS, batch_size=BATCH_SIZE)


@pytest.fixture
def load(tiny_job: Path, tmp_path: Path) -> Load:
    """The config of a local run in a directory of its own."""

    def load(*overrides: str, run: str = "run") -> Config:
        mode = ("run.mode=local", f"run.directory={tmp_path / run}")
        return load_config(tiny_job, [*mode, *overrides])

    return load


def train(config: Config, store: TargetStore[TeacherTargets] | None = None) -> list[StepRecord]:
    local.check(config)
    view = ConsoleView(config.learner.num_steps, stream=io.StringIO())
    local.train(config, preflight.check(config), view, store=store)
    return records(config.run.local_directory, StepRecord)


def num_scored(steps: list[StepRecord]) -> int:
    return sum(step.work.scored_sequences for step in steps)


# ---- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("learner.workers=2",), "learner.workers must be 1, got 2: one process is one rank"),
        (("rollout.actors=2",), "rollout.actors must be 1, got 2"),
        (("rollout.engine={type: vllm}",), "rollout.engine.type must be transformers, got vllm"),
        (("teacher.actors=3",), "teacher.actors must be 1, got 3"),
        (("teacher.tensor_parallel=2",), "teacher.tensor_parallel must be 1, got 2"),
        (("targets.stores=2",), "targets.stores must be 1, got 2: one process has one store"),
        (("evaluation.at_end=true",), "evaluation.at_end must be false, got true: evaluate model/"),
        (("run.metrics_port=8090",), "run.metrics_port must be null, got 8090"),
        (("student.dtype=bfloat16",), "student.dtype must be float32, got bfloat16"),
    ],
    ids=lambda value: value[0].partition("=")[0] if isinstance(value, tuple) else "",
)
def test_settings_that_need_several_processes_are_refused_by_key(
    load: Load, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        local.check(load(*overrides))
    assert message in str(caught.value)


def test_a_refusal_names_all_keys_and_the_overrides_that_help(load: Load) -> None:
    wrong = ("learner.workers=2", "rollout.engine={type: vllm}", "evaluation.at_end=true")
    with pytest.raises(ConfigError) as caught:
        local.check(load(*wrong))
    remedy = str(caught.value).splitlines()[-1]
    needed = "learner.workers=1 evaluation.at_end=false rollout.engine.type=transformers"
    assert remedy == f"Add {needed}, or set run.mode=cluster"
    local.check(load(*wrong, *needed.split()))


def test_settings_that_a_run_does_not_use_are_not_refused(load: Load) -> None:
    without_rollouts = ("schedule={type: fixed, phi: 0}", "rollout.engine={type: vllm}")
    without_teacher = ("teacher=null", "loss.terms=[{type: cross_entropy}]", "targets.stores=2")
    local.check(load(*without_rollouts, *without_teacher, "learner.zero_stage=3"))


def test_the_command_line_refuses_before_anything_is_loaded_or_written(
    tiny_job: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    arguments = ["run.mode=local", f"run.directory={run}", "rollout.actors=2"]
    result = CliRunner().invoke(app, ["train", str(tiny_job), *arguments])
    assert result.exit_code == EXIT_USER_ERROR
    assert "rollout.actors must be 1, got 2" in result.stderr
    assert not run.exists()


def test_the_directory_of_a_run_on_a_cluster_is_refused(load: Load, tiny_job: Path) -> None:
    directory = load().run.local_directory
    directory.mkdir()
    overrides = [f"run.directory={directory}"]
    (directory / "config.yaml").write_text(dump_config(load_config(tiny_job, overrides)))
    with pytest.raises(RunDirectoryError, match=r"run\.mode: 'cluster' in the run, 'local' now"):
        preflight.check(load())


def test_show_prints_no_resources_for_a_local_run(tiny_job: Path) -> None:
    shown = CliRunner().invoke(app, ["show", str(tiny_job), "run.mode=local"]).stdout
    assert "run.mode is local" in shown
    assert "asked of the cluster" not in shown
    assert "mode: local" in shown


# ---- what it does -------------------------------------------------------------------------------


def test_a_run_in_a_store_leaves_its_log_and_its_model_there(
    store: ObjectStore, tiny_job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"s3://{BUCKET}/runs/local"
    command = ["train", str(tiny_job), "run.mode=local", f"run.directory={run}", *DATASET_ONLY]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.stderr
    assert f"The run is in {run}." in ended.stdout
    keys = store.keys("runs/local")
    for name in ("config.yaml", "metrics.jsonl", "model/model.safetensors", "summary.json"):
        assert f"runs/local/{name}" in keys
    assert "runs/local/lease.json" not in keys
    monkeypatch.setenv("DISTILLM_RAY_CACHE", str(tmp_path / "of another machine"))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.stderr
    assert f"The run in {run} is complete." in again.stdout
    longer = CliRunner().invoke(app, [*command, "learner.steps=5"])
    assert longer.exit_code == EXIT_USER_ERROR
    assert f"{run} holds a finished run" in longer.stderr
    assert store.keys("runs/local") == keys


def test_a_run_leaves_its_log_and_its_model_which_no_second_run_replaces(load: Load) -> None:
    config = load()
    first = train(config)
    directory = config.run.local_directory
    assert [step.step for step in first] == [1, 2, 3, 4]
    assert [one.step for one in records(directory, ValidationRecord)] == [0, STEPS]
    assert [(one.step, one.status) for one in records(directory, DoneRecord)] == [
        (STEPS, "complete")
    ]
    assert (directory / MODEL_FOLDER / "model.safetensors").is_file()
    assert preflight.is_complete(config)
    longer = load("learner.steps=5")
    with pytest.raises(RunDirectoryError, match="holds a finished run"):
        train(longer)

    shutil.rmtree(directory / MODEL_FOLDER)  # as after a kill
    assert "starts again" in local.check_start(config)[0]
    again = train(config)
    assert [step.loss for step in again] == [step.loss for step in first]


def test_it_loads_neither_ray_nor_vllm_nor_deepspeed(load: Load, tiny_job: Path) -> None:
    program = (
        "import sys\n"
        "from distillm_ray.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('ray', 'vllm', 'deepspeed') if name in sys.modules])"
    )
    overrides = ["run.mode=local", f"run.directory={load().run.local_directory}"]
    done = subprocess.run(
        [sys.executable, "-c", program, "train", str(tiny_job), *overrides],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "complete at step 4" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_later_epochs_and_replayed_responses_are_not_scored_again(load: Load) -> None:
    assert NUM_TRAIN == 3 * BATCH_SIZE
    steps = train(load(*DATASET_ONLY, *TWO_EPOCHS))
    assert [step.work.scored_sequences for step in steps] == [8, 8, 8, 0, 0, 0]
    # Only fresh responses are scored: replayed ones were scored when they were fresh.
    steps = train(load("learner.steps=12", "schedule.phi=1", run="student"))
    assert sum(step.mix.replay for step in steps) > 10
    for step in steps:
        assert step.work.scored_sequences == step.mix.fresh


def test_a_second_seed_finds_what_the_first_has_scored(load: Load) -> None:
    store: TargetStore[TeacherTargets] = TargetStore(10**7)
    first = train(load(*DATASET_ONLY, *TWO_EPOCHS, run="first"), store)
    second = train(load(*DATASET_ONLY, *TWO_EPOCHS, "run.seed=1", run="second"), store)
    assert (num_scored(first), num_scored(second)) == (NUM_TRAIN, 0)
    assert first[0].rollout_ids != second[0].rollout_ids
    alone = train(load(*DATASET_ONLY, *TWO_EPOCHS, "run.seed=1", run="alone"))
    assert [step.loss for step in second] == pytest.approx([step.loss for step in alone], rel=1e-5)


def test_a_second_run_scores_nothing_that_the_first_left_in_the_library(
    load: Load, tmp_path: Path
) -> None:
    library = f"targets.library={tmp_path / 'targets'}"
    overrides = (*DATASET_ONLY, *TWO_EPOCHS)
    first = train(load(*overrides, library, run="first"))
    changed = (*overrides, library, "run.seed=1", "learner.learning_rate=0.002")
    second = train(load(*changed, run="second"))
    assert (num_scored(first), num_scored(second)) == (NUM_TRAIN, 0)
    assert sum(step.work.scored_tokens for step in second) == 0
    assert [step.work.library_sequences for step in second] == [8, 8, 8, 0, 0, 0]
    scored = Totals.of(first)
    found = Totals.of(second)
    assert found.work.library_tokens == scored.work.scored_tokens > 0
    assert found.work.score_seconds == 0.0
    # No more than the wall-clock of the calls that have computed them.
    assert 0 < found.work.library_seconds <= scored.work.score_seconds
    assert (scored.target_reuse_sequences, found.target_reuse_sequences) == (0.5, 1.0)
    alone = train(load(*changed[:-3], *changed[-2:], run="alone"))
    assert [step.loss for step in second] == pytest.approx([step.loss for step in alone], rel=1e-5)


def test_a_small_store_reads_from_the_library_what_it_has_evicted(
    load: Load, tmp_path: Path
) -> None:
    library = f"targets.library={tmp_path / 'targets'}"
    steps = train(load(*DATASET_ONLY, *TWO_EPOCHS, library, "targets.max_bytes=1"))
    assert [step.work.scored_sequences for step in steps] == [8, 8, 8, 0, 0, 0]
    assert [step.work.library_sequences for step in steps] == [0, 0, 0, 8, 8, 8]


def test_what_the_student_wrote_is_not_kept_in_the_library(load: Load, tmp_path: Path) -> None:
    library = f"targets.library={tmp_path / 'targets'}"
    phi = "schedule={type: fixed, phi: 1, replay_ratio: none}"
    steps = train(load(phi, library))
    assert num_scored(steps) == STEPS * BATCH_SIZE
    assert list(tmp_path.glob("targets/*")) == []


def test_a_store_that_keeps_nothing_changes_no_loss(load: Load) -> None:
    overrides = (*DATASET_ONLY, *TWO_EPOCHS)
    kept = train(load(*overrides, run="kept"))
    lost = train(load(*overrides, "targets.max_bytes=1", run="lost"))
    assert (num_scored(kept), num_scored(lost)) == (24, 48)
    assert [step.loss for step in kept] == pytest.approx([step.loss for step in lost], rel=1e-5)


def test_two_rows_with_the_same_text_are_scored_once(load: Load, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.jsonl", tmp_path / "twice.jsonl"
    make_rows(once, 8, start=0)
    rows = [json.loads(line) for line in once.read_text().splitlines()]
    copies = [{**row, "id": f"copy of {row['id']}"} for row in rows]
    twice.write_text("".join(json.dumps(row) + "\n" for row in rows + copies))
    steps = train(load(*DATASET_ONLY, f"data.train=[{twice}]", "learner.steps=2"))
    assert len({name for step in steps for name in step.rollout_ids["dataset"]}) == 16
    texts = {(row["prompt"], row["response"]) for row in rows}
    assert num_scored(steps) == len(texts)


def test_a_response_that_the_filter_drops_is_generated_again_and_then_kept(load: Load) -> None:
    # Greedy decoding repeats the response, so every attempt but the last is dropped.
    overrides = ("rollout.filter.drop_truncated=true", "rollout.sampling.temperature=0")
    steps = train(load(*overrides, "schedule={type: fixed, phi: 1, replay_ratio: none}"))
    truncated = sum(step.work.truncated for step in steps)
    assert truncated > 0
    assert sum(step.work.dropped for step in steps) == truncated * 3 // 4
    assert all(step.mix.fresh == BATCH_SIZE for step in steps)


def test_minillm_learns_a_corpus_beside_its_own_text(load: Load, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    make_corpus(corpus, 10)
    method = load("method=minillm", "rollout.max_staleness=2").loss.model_dump()
    on_corpus = {"on": "corpus", "type": "cross_entropy", "weight": 0.5}
    terms = json.dumps([*method["terms"], on_corpus])
    config = load(
        "method=minillm",
        "rollout.max_staleness=2",
        f"loss.terms={terms}",
        f"data.corpus=[{corpus}]",
        "data.corpus_batch=4",
        *("learner.steps=20", "learner.learning_rate=0.01", "validation.interval=20"),
    )
    steps = train(config)
    assert {(step.mix.fresh, step.mix.corpus) for step in steps} == {(8, 4)}
    name = "cross_entropy on corpus"
    losses = [step.loss_by_term[name] for step in steps]
    assert losses[-1] < 0.7 * losses[0]
    for step in steps:
        # The tokens of the corpus have one term of weight 0.5, and its mean over them is the loss.
        assert step.loss_by_shelf["corpus"] == pytest.approx(
            0.5 * step.loss_by_term[name], rel=1e-5
        )
        assert len(step.rollout_ids["corpus"]) == 4
        # The teacher sees what the student wrote and none of the corpus.
        assert step.untargeted_sequences == 4
    assert num_scored(steps) <= sum(step.mix.fresh for step in steps)
    totals = Totals.of(records(config.run.local_directory))
    assert totals.mix.corpus == 80
    assert 0.0 <= totals.target_reuse_sequences < 0.2
    rows = (config.run.local_directory / ROWS_FILE).read_text()
    assert "corpus-1.0: 18 tokens, 17 under the loss" in rows


def test_a_divergence_on_the_corpus_has_its_pieces_scored_once(load: Load, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    make_corpus(corpus, 8)
    terms = "loss.terms=[{type: cross_entropy}, {type: forward_kl, on: corpus, weight: 2.0}]"
    config = load(
        "schedule={type: fixed, phi: 0}", terms, f"data.corpus=[{corpus}]", "learner.steps=4"
    )
    steps = train(config)
    # Of 8 data-set sequences, none is compared with the teacher; 8 pieces are a whole epoch.
    assert [step.work.scored_sequences for step in steps] == [8, 0, 0, 0]
    assert Totals.of(records(config.run.local_directory)).target_reuse_sequences == 0.75


@pytest.mark.parametrize(
    "override", ["learner.activation_checkpointing=full", "student.lora={rank: 2}"]
)
def test_adapters_and_activation_checkpointing_train_too(load: Load, override: str) -> None:
    steps = train(load(override, "learner.learning_rate=0.1", "loss.terms=[{type: forward_kl}]"))
    assert not any(step.skipped for step in steps)
    assert steps[-1].loss != steps[0].loss


def test_non_finite_steps_end_the_run(load: Load) -> None:
    huge = ("learner.learning_rate=1e30", "learner.warmup_steps=0", "validation.interval=9")
    config = load(*DATASET_ONLY, *huge, "learner.max_skipped_steps=1", "learner.steps=9")
    with pytest.raises(UserError, match="not finite in 2 steps in a row"):
        train(config)
