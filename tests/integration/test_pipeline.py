"""Whole runs of tiny models by the command line: undisturbed, with two of each role, disturbed.

The disturbed run has the config of the undisturbed one. Its first driver is killed and its second
is told to stop. The third loses a generator, a learner, the replay buffer and the controller of the
learners. All runs must draw the same sequences.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillm_ray.directory_lock import locked
from distillm_ray.learner.checkpoint import CheckpointDirectory
from distillm_ray.log.prometheus import Metric
from distillm_ray.log.records import REWOUND, DoneRecord, EventRecord, PublishRecord, StepRecord
from distillm_ray.replay.state import BufferState
from distillm_ray.types import TRAINING
from scripts.monitoring import DASHBOARD
from tests.integration.prometheus import Prometheus, find_prometheus
from tests.integration.ray_nodes import free_ports
from tests.integration.tiny import (
    LIMIT_S,
    Driver,
    Process,
    checkpointed,
    drawn,
    fresh_ordinals,
    make_config,
    marked_processes,
    records,
    wait_until_gone,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(4 * LIMIT_S)]

STEPS, BATCH_SIZE = 48, 8
SCALED_STEPS = 12
# After their node has died, they try for minutes to report it before they end.
RAYS_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
POOLS = ("GeneratorActor", "ScorerActor", "TargetStoreActor", "RayTrainWorker")
VLLM = ("rollout.engine={type: vllm, max_num_seqs: 8}",)
EVALUATED = ("evaluation.at_end=true", "evaluation.max_prompts=4")


@dataclass(frozen=True, slots=True)
class Whole:
    """The undisturbed run."""

    command: tuple[str, ...]
    run: Path
    output: str
    prometheus: Prometheus | None  # it scraped the run; None: not installed


@dataclass(frozen=True, slots=True)
class Scaled:
    """The run with two learner ranks, generators, scorers and target stores."""

    run: Path
    processes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Disturbed:
    """What was observed during the disturbed run."""

    run: Path
    held_while_running: bool  # whether the run directory was locked
    left_by_the_killed: list[Process]
    agents_left_by_the_killed: list[Process]
    step_of_the_killed: int
    code_of_the_stopped: int
    steps_of_the_stopped: tuple[int, int]  # the first and the last that it trained
    checkpoint_of_the_stopped: int
    code_of_the_last: int


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_config(tmp_path_factory.mktemp("tiny"), steps=STEPS, batch_size=BATCH_SIZE)


@pytest.fixture(scope="module")
def whole(config: Path) -> Iterator[Whole]:
    run = config.parent / "whole"
    (port,) = free_ports(1)
    command = (
        *("train", str(config), f"run.directory={run}", *EVALUATED),
        f"run.metrics_port={port}",
    )
    often = {"RAY_metrics_report_interval_ms": "2000"}
    with ExitStack() as stack:
        prometheus = None
        if (program := find_prometheus()) is not None:
            server = Prometheus(program, config.parent / "prometheus", f"127.0.0.1:{port}")
            prometheus = stack.enter_context(server)
        log = config.parent / "whole.log"
        driver = stack.enter_context(Driver(*command, log=log, environment=often))
        assert driver.wait(LIMIT_S) == 0, driver.output()
        yield Whole(command=command, run=run, output=driver.output(), prometheus=prometheus)


@pytest.fixture(scope="module")
def scaled(config: Path) -> Scaled:
    run = config.parent / "scaled"
    numbers = ("learner.workers=2", "rollout.actors=2", "teacher.actors=2", "targets.stores=2")
    command = ("train", str(config), f"run.directory={run}", f"learner.steps={SCALED_STEPS}")
    with Driver(*command, *numbers, "learner.zero_stage=2", log=run.with_suffix(".log")) as driver:
        driver.wait_for(lambda: checkpointed(run, 2), LIMIT_S)
        titles = [process.title for process in marked_processes(driver.mark)]
        assert driver.wait(LIMIT_S) == 0, driver.output()
    return Scaled(run=run, processes={name: count(titles, name) for name in POOLS})


def count(titles: list[str], name: str) -> int:
    """The number of Ray's processes for that actor, idle ones included."""
    return sum(title.startswith("ray::") and name in title for title in titles)


@pytest.fixture(scope="module")
def disturbed(config: Path) -> Disturbed:
    run = config.parent / "disturbed"
    command = ("train", str(config), f"run.directory={run}")
    with Driver(*command, *VLLM, log=config.parent / "killed.log") as killed:
        killed.wait_for(lambda: checkpointed(run, 4), LIMIT_S)
        killed.find("EngineCore")
        with locked(run) as free:
            held_while_running = not free
        killed.send(signal.SIGKILL)
        killed.wait(10)
        left = wait_until_gone(killed.mark, 30, besides=RAYS_AGENTS)
        killed_at = newest_checkpoint(run)
        with Driver(*command, log=config.parent / "stopped.log") as driver:
            driver.wait_for(lambda: checkpointed(run, killed_at + 2), LIMIT_S)
            driver.send(signal.SIGTERM)
            stopped_code = driver.wait(LIMIT_S)
        steps = [record.step for record in records(run, StepRecord)]
        stopped_at = newest_checkpoint(run)
        with Driver(*command, log=config.parent / "last.log") as driver:
            driver.wait_for(lambda: checkpointed(run, stopped_at + 2), LIMIT_S)
            os.kill(driver.find("ray::GeneratorActor").pid, signal.SIGKILL)
            generator_lost_at = newest_checkpoint(run)
            driver.wait_for(lambda: checkpointed(run, generator_lost_at + 4), LIMIT_S)
            os.kill(driver.find("RayTrainWorker").pid, signal.SIGKILL)
            driver.wait_for(lambda: rewinds(run) == 1, LIMIT_S)
            learner_lost_at = newest_checkpoint(run)
            driver.wait_for(lambda: checkpointed(run, learner_lost_at + 2), LIMIT_S)
            os.kill(driver.find("ray::BufferActor").pid, signal.SIGKILL)
            driver.wait_for(lambda: rewinds(run) == 2, LIMIT_S)
            buffer_lost_at = newest_checkpoint(run)
            driver.wait_for(lambda: checkpointed(run, buffer_lost_at + 2), LIMIT_S)
            os.kill(driver.find("ray::TrainController").pid, signal.SIGKILL)
            last_code = driver.wait(LIMIT_S)
            assert last_code == 0, driver.output()
        # Meanwhile they have had their minutes.
        agents_left = wait_until_gone(killed.mark, 240)
    return Disturbed(
        run=run,
        held_while_running=held_while_running,
        left_by_the_killed=left,
        agents_left_by_the_killed=agents_left,
        step_of_the_killed=killed_at,
        code_of_the_stopped=stopped_code,
        steps_of_the_stopped=(killed_at + 1, max(steps)),
        checkpoint_of_the_stopped=stopped_at,
        code_of_the_last=last_code,
    )


def rewinds(run: Path) -> int:
    """How often the learners went back to their checkpoint."""
    return sum(record.name == REWOUND for record in records(run, EventRecord))


def newest_checkpoint(run: Path) -> int:
    checkpoint = CheckpointDirectory(run / "checkpoints", keep=2).latest()
    assert checkpoint is not None
    return checkpoint.meta.step


# ---- the undisturbed run -------------------------------------------------------------------------


def test_every_step_is_logged_once_with_what_was_drawn(whole: Whole) -> None:
    steps = records(whole.run, StepRecord)
    assert [record.step for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert record.mix.total == BATCH_SIZE
        assert record.mix.fresh == len(record.rollout_ids["fresh"])
        assert record.mix.replay == len(record.rollout_ids["replay"])
        assert record.mix.dataset == len(record.rollout_ids["dataset"])
        assert record.phi == 0.6
        assert 0 <= record.fresh_age_max <= 2
        assert math.isfinite(record.loss)
        assert record.gradient_norm > 0
        assert record.learning_rate > 0
        assert record.loss_tokens > 0
        assert 0 <= record.wait_seconds < record.seconds
        assert not record.skipped
    # phi 0.6, half of it replayed, over 320 slots: four standard deviations
    assert 0.6 * 320 - 35 < sum(r.mix.fresh + r.mix.replay for r in steps) < 0.6 * 320 + 35
    assert sum(record.mix.replay for record in steps) > 50
    early, late = (sum(record.loss for record in part) for part in (steps[:5], steps[-5:]))
    assert late < early / 10, "the student learns to match the teacher"


def test_fresh_ordinals_are_consumed_in_order_and_replays_were_fresh_before(whole: Whole) -> None:
    ordinals = list(fresh_ordinals(whole.run))
    assert sorted(ordinals) == list(range(len(ordinals)))
    seen: set[str] = set()
    for record in records(whole.run, StepRecord):
        assert set(record.rollout_ids["replay"]) <= seen
        seen.update(record.rollout_ids["fresh"])


def test_each_sequence_is_scored_at_its_first_visit_only(whole: Whole) -> None:
    steps = records(whole.run, StepRecord)
    visits = [name for record in steps for name in record.rollout_ids["dataset"]]
    assert len(visits) > 2 * len(set(visits)), "the data set is visited more than twice"
    scored = sum(record.work.scored_sequences for record in steps)
    assert scored == len(set(visits)) + len(list(fresh_ordinals(whole.run)))
    assert sum(record.work.target_evictions for record in steps) == 0


def test_weights_are_published_every_sync_interval(whole: Whole) -> None:
    published = [record.step for record in records(whole.run, PublishRecord)]
    assert [step for step in published if step > 0] == list(range(2, STEPS + 1, 2))


def test_summary_and_evaluation_agree_with_the_log(whole: Whole) -> None:
    summary = json.loads((whole.run / "summary.json").read_text())
    assert summary["status"] == "complete"
    assert summary["steps"] == STEPS
    assert summary["superseded_steps"] == 0
    assert summary["packing_efficiency"] >= 0.95
    scored = sum(record.work.scored_sequences for record in records(whole.run, StepRecord))
    assert summary["target_reuse_sequences"] == pytest.approx(1 - scored / (STEPS * BATCH_SIZE))
    assert 0 < summary["target_reuse_tokens"] < 1
    assert summary["totals"]["publishes"] >= STEPS / 2
    models = json.loads((whole.run / "evaluation.json").read_text())["models"]
    assert set(models) == {"student before", "student after", "teacher"}
    before, after = models["student before"], models["student after"]
    assert before["validation_loss"] == pytest.approx(summary["first_validation_loss"], rel=1e-4)
    assert after["validation_loss"] == pytest.approx(summary["last_validation_loss"], rel=1e-4)
    for row in ("student before", "student after", "teacher"):
        assert row in whole.output
    assert list((whole.run / "plots").glob("*.png"))
    assert (whole.run / "samples.md").is_file()


def test_evaluate_reproduces_the_numbers_of_the_run(whole: Whole, config: Path) -> None:
    output = config.parent / "evaluated"
    _, *run = whole.command
    command = ("evaluate", *run, "--output", str(output))
    with Driver(*command, log=config.parent / "evaluate.log") as driver:
        assert driver.wait(LIMIT_S) == 0, driver.output()
    expected, got = (
        json.loads((directory / "evaluation.json").read_text()) for directory in (whole.run, output)
    )
    (scores,) = got["models"].values()
    after = expected["models"]["student after"]
    assert scores["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-4)
    assert scores["rouge_l"] == after["rouge_l"]
    assert scores["bleu"] == after["bleu"]
    assert got["num_prompts"] == expected["num_prompts"] == 4


def test_the_model_loads_in_plain_transformers_and_was_trained(whole: Whole, config: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole.run / "model")
    untrained = AutoModelForCausalLM.from_pretrained(config.parent / "student")
    tokenizer = AutoTokenizer.from_pretrained(whole.run / "model")
    ids = tokenizer("what follows three and four", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits, before = model(ids).logits, untrained(ids).logits
    assert torch.isfinite(logits).all()
    assert (logits - before).abs().max() > 0.01


PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
model, prompts, length = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
engine = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=8)
sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
print("RESPONSES", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


def test_the_model_responds_in_plain_vllm_as_in_plain_transformers(whole: Whole) -> None:
    directory, length = whole.run / "model", 8
    prompts = [[1, 16, 17, 4 + start, 2] for start in range(8)]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN_VLLM, str(directory), json.dumps(prompts), str(length)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESPONSES ")]
    responses = torch.tensor(json.loads(line.removeprefix("RESPONSES ")))
    assert responses.shape == (len(prompts), length)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.cat([torch.tensor(prompts), responses], dim=1)).logits
    assert torch.equal(responses, logits[:, len(prompts[0]) - 1 : -1].argmax(-1))


def test_a_complete_run_is_reported_and_not_run_again(whole: Whole, config: Path) -> None:
    with Driver(*whole.command, log=config.parent / "again.log") as driver:
        assert driver.wait(LIMIT_S) == 0, driver.output()
        assert f"The run in {whole.run} is complete." in driver.output()
    assert len(records(whole.run, DoneRecord)) == 1


# ---- its metrics ---------------------------------------------------------------------------------

# Of what does not happen in an undisturbed run of this config on a CPU.
NOT_SEEN = {
    Metric.REWINDS,
    Metric.POOL_RESTARTS,
    Metric.SKIPPED_STEPS,
    Metric.INFINITE_TOKENS,
    Metric.LOST_ORDINALS,
    Metric.DROPPED_SEQUENCES,
    Metric.GIVEN_UP_PROMPTS,
    Metric.LATE_SAMPLES,
    Metric.TARGET_EVICTIONS,
    Metric.LIBRARY_SEQUENCES,
    Metric.GPU_SECONDS,
}


@pytest.fixture
def prometheus(whole: Whole) -> Prometheus:
    if whole.prometheus is None:
        pytest.skip("Prometheus is not installed: `make prometheus`, or apt-get install prometheus")
    return whole.prometheus


def test_prometheus_answers_every_query_of_the_dashboard(prometheus: Prometheus) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) > 50
    absent = {metric.value.exported for metric in NOT_SEEN}
    by_chance = Metric.QUEUE_SECONDS.value.exported  # a call may have found no free place
    for query in (one for one in queries if by_chance not in one):
        names = set(re.findall(r"\bray_distillm_\w+", query))
        concrete = query.replace("$__rate_interval", "1m").replace("$run", "whole")
        series = prometheus.over_time(concrete)
        assert {one["metric"]["run"] for one in series} == (
            set() if names & absent else {"whole"}
        ), query


def test_prometheus_has_the_numbers_of_the_log(prometheus: Prometheus, whole: Whole) -> None:
    """Those after any step: nothing waits for a scrape, so the last ones may be missing."""
    steps = records(whole.run, StepRecord)
    counted = {
        Metric.TRAINED_TOKENS: [record.tokens for record in steps],
        Metric.GENERATED_TOKENS: [record.work.generated_tokens for record in steps],
        Metric.SCORED_SEQUENCES: [record.work.scored_sequences for record in steps],
        Metric.SLOTS: [BATCH_SIZE] * STEPS,
    }
    for metric, values in counted.items():
        found = prometheus.highest(f"sum({metric.value.exported})")
        assert found in set(accumulate(values)), f"{metric} after one of the steps"
    assert prometheus.highest(Metric.STEP.value.exported) in range(1, STEPS + 1)
    assert prometheus.highest(Metric.PLANNED_STEPS.value.exported) == STEPS
    steps_seen = prometheus.highest(f"{Metric.STEP_SECONDS.value.exported}_count")
    assert steps_seen in range(1, STEPS + 1)
    for role in ("generator", "scorer"):
        pool = f'{{role="{role}"}}'
        assert prometheus.highest(Metric.POOL_SIZE.value.exported + pool) == 1
        assert prometheus.highest(Metric.POOL_READY.value.exported + pool) == 1
    phases = prometheus.over_time(f"{Metric.PHASE.value.exported} == 1")
    assert TRAINING in {one["metric"]["phase"] for one in phases}


# ---- two of each role ----------------------------------------------------------------------------


def test_every_role_runs_in_as_many_processes_as_configured(scaled: Scaled) -> None:
    assert scaled.processes == dict.fromkeys(POOLS, 2)


def test_more_actors_do_not_change_the_draws(whole: Whole, scaled: Scaled) -> None:
    expected, got = drawn(whole.run), drawn(scaled.run)
    assert got == {step: expected[step] for step in range(1, SCALED_STEPS + 1)}


def test_two_ranks_report_the_loss_and_gradient_norm_of_one(whole: Whole, scaled: Scaled) -> None:
    one, two = (records(run, StepRecord)[0] for run in (whole.run, scaled.run))
    assert two.tokens == one.tokens
    assert two.loss == pytest.approx(one.loss, rel=1e-4)
    assert two.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3)


# ---- the disturbed run ---------------------------------------------------------------------------


def test_a_run_directory_is_locked_while_its_job_runs(disturbed: Disturbed) -> None:
    assert disturbed.held_while_running
    with locked(disturbed.run) as free:
        assert free


def test_no_process_is_left_of_a_run_whose_driver_is_killed(disturbed: Disturbed) -> None:
    assert disturbed.left_by_the_killed == []
    assert disturbed.agents_left_by_the_killed == []


def test_sigterm_leaves_a_checkpoint_of_the_last_step_and_exit_code_3(
    disturbed: Disturbed,
) -> None:
    assert disturbed.code_of_the_stopped == 3
    first, last = disturbed.steps_of_the_stopped
    assert first <= last < STEPS
    assert disturbed.checkpoint_of_the_stopped == last


def test_a_run_that_lost_each_role_once_ends_with_the_same_number_of_steps(
    disturbed: Disturbed,
) -> None:
    assert disturbed.code_of_the_last == 0
    steps = [record.step for record in records(disturbed.run, StepRecord)]
    assert steps == list(range(1, STEPS + 1))
    events = [record.name for record in records(disturbed.run, EventRecord)]
    assert "generator 0 failed" in events
    assert "generator 0 is back" in events
    assert events.count("replay buffer died") == 1
    assert rewinds(disturbed.run) == 3, "for the learner, the buffer and Ray Train's controller"
    ordinals = list(fresh_ordinals(disturbed.run))
    assert sorted(ordinals) == list(range(len(ordinals))), "no prompt was skipped"


def test_a_disturbed_run_draws_what_the_undisturbed_one_draws(
    whole: Whole, disturbed: Disturbed
) -> None:
    expected, got = drawn(whole.run), drawn(disturbed.run)
    for step, facts in expected.items():
        assert got[step] == facts, f"step {step}"
    prompts, got_prompts = prompts_at_the_end(whole.run), prompts_at_the_end(disturbed.run)
    assert len(prompts) > 50
    assert got_prompts == prompts


def prompts_at_the_end(run: Path) -> list[tuple[str, str]]:
    """Rollout and prompt ids of the replay shelf, which holds every fresh rollout of a run."""
    checkpoint = CheckpointDirectory(run / "checkpoints", keep=2).latest()
    assert checkpoint is not None
    replay = BufferState.from_bytes(checkpoint.buffer_state()).replay
    return [(rollout.rollout_id, rollout.prompt_id) for rollout in replay]
