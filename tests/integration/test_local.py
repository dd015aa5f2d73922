"""`run.mode=local` against the cluster: the same config gives the same draws, losses and weights.

Greedy and strictly on-policy, so that nothing depends on an engine's batches or on timing.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from distillm_ray.config import DataConfig
from distillm_ray.data import ray_data, tokenizing
from distillm_ray.data.files import find_files
from distillm_ray.data.templates import Renderer
from distillm_ray.log.records import ProbeRecord, StepRecord, ValidationRecord
from distillm_ray.run_directory import MODEL_FOLDER
from tests.integration.tiny import LIMIT_S, Driver, drawn, make_config, make_corpus, records

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_S)]

STEPS, BATCH_SIZE = 20, 8
EXACT = (
    "rollout.sampling.temperature=0",
    "rollout.lookahead=1",
    "rollout.sync_interval=1",
    "rollout.max_staleness=0",
    "validation={interval: 4, probe_prompts: 0}",
    "checkpoint.interval=20",
)
# At these learning rates rounding does not grow. At 3.0 it grows from 1e-7 to 1e-2 in 20 steps.
METHODS = {
    "distillm": (
        "schedule={type: adaptive, start: 0.4, increment: 0.2}",
        "loss.terms=[{type: skew_kl}, {type: cross_entropy, weight: 0.03}]",
        "learner={optimizer: sgd, learning_rate: 0.3}",
    ),
    "sft": (
        "teacher=null",
        "schedule={type: fixed, phi: 0}",
        "loss.terms=[{type: cross_entropy}]",
        "learner={optimizer: adamw, learning_rate: 0.01}",
    ),
    "distillm2": ("method=distillm2", "learner={optimizer: sgd, learning_rate: 0.3}"),
    "minillm": ("method=minillm", "learner={optimizer: sgd, learning_rate: 0.03}"),
    # The teacher scores what the student wrote and the corpus, not the data set beside them.
    "corpus": (
        "schedule={type: fixed, phi: 0.5, replay_ratio: none}",
        "loss.terms=[{on: student, type: forward_kl}, {type: cross_entropy},"
        " {on: corpus, type: forward_kl, weight: 0.5}]",
        "data.corpus=[corpus.jsonl]",
        "data.corpus_batch=3",
        "learner={optimizer: sgd, learning_rate: 0.1}",
    ),
    "prompts": (
        "method=opd",
        "learner={optimizer: sgd, learning_rate: 0.1}",
        "data={train: [prompts.jsonl], validation: [held_out_prompts.jsonl]}",
    ),
}
# CI compares these; the others nightly.
ALWAYS = ("distillm", "prompts")
# Float32 sums in another order. Weights are around 0.2, and the largest moves by more than 0.01.
ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs of one config."""

    method: str
    cluster: Path
    local: Path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_config(tmp_path_factory.mktemp("tiny"), steps=STEPS, batch_size=BATCH_SIZE)
    # With their initial weights, both models repeat the last token even after training. With larger
    # weights their greedy responses change from step to step.
    for name in ("teacher", "student"):
        model = LlamaForCausalLM.from_pretrained(path.parent / name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(10.0)
        model.save_pretrained(path.parent / name)
    make_corpus(path.parent / "corpus.jsonl", 10)
    for source, target in (("train", "prompts"), ("validation", "held_out_prompts")):
        rows = map(json.loads, (path.parent / f"{source}.jsonl").read_text().splitlines())
        prompts = [json.dumps({"prompt": row["prompt"]}) for row in rows]
        (path.parent / f"{target}.jsonl").write_text("\n".join(prompts))
    return path


def train(config: Path, **overrides: Sequence[str]) -> list[Path]:
    """Run them side by side; returns the run directories."""
    runs, drivers = list[Path](), list[Driver]()
    with contextlib.ExitStack() as stack:
        for name, given in overrides.items():
            run = config.parent / name
            absolute = (
                one.replace("[", f"[{config.parent}/") if ".jsonl" in one else one for one in given
            )
            command = ("train", str(config), f"run.directory={run}", *EXACT, *absolute)
            runs.append(run)
            drivers.append(stack.enter_context(Driver(*command, log=run.with_suffix(".log"))))
        for driver in drivers:
            assert driver.wait(LIMIT_S) == 0, driver.output()
    return runs


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in METHODS
    ],
)
def pair(request: pytest.FixtureRequest, config: Path) -> Pair:
    method: str = request.param
    cluster, local = train(
        config,
        **{f"{method}-cluster": METHODS[method]},
        **{f"{method}-local": ("run.mode=local", *METHODS[method])},
    )
    return Pair(method=method, cluster=cluster, local=local)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / MODEL_FOLDER / "model.safetensors")


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two parameters."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_the_parameters_are_equal_to_rounding(pair: Pair, config: Path) -> None:
    assert distance(weights(pair.local), weights(pair.cluster)) < ROUNDING
    before = load_file(config.parent / "student" / "model.safetensors")
    assert distance(weights(pair.local), before) > 1000 * ROUNDING


def test_every_step_draws_the_same_sequences(pair: Pair) -> None:
    assert drawn(pair.local) == drawn(pair.cluster)
    shelves = {shelf for _, ids, _ in drawn(pair.local).values() for shelf in ids if ids[shelf]}
    assert (
        shelves
        == {
            "distillm": {"fresh", "replay", "dataset"},
            "sft": {"dataset"},
            "distillm2": {"fresh", "dataset"},
            "minillm": {"fresh"},
            "corpus": {"fresh", "dataset", "corpus"},
            "prompts": {"fresh"},
        }[pair.method]
    )


def test_every_step_has_the_same_losses(pair: Pair) -> None:
    local, cluster = records(pair.local, StepRecord), records(pair.cluster, StepRecord)
    assert [step.step for step in local] == list(range(1, STEPS + 1))
    for one, other in zip(local, cluster, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=ROUNDING)
        assert one.loss_by_term == pytest.approx(other.loss_by_term, abs=ROUNDING)
        assert one.alpha_by_term == pytest.approx(other.alpha_by_term, abs=100 * ROUNDING)
        assert one.loss_by_shelf == pytest.approx(other.loss_by_shelf, abs=ROUNDING)
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)
        assert one.learning_rate == other.learning_rate
        assert (one.tokens, one.fresh_age_max) == (other.tokens, other.fresh_age_max)


def test_validation_and_phi_are_the_same_at_the_same_steps(pair: Pair) -> None:
    local, cluster = records(pair.local, ValidationRecord), records(pair.cluster, ValidationRecord)
    assert [one.step for one in local] == [0, 4, 8, 12, 16, 20]
    assert [(one.step, one.phi) for one in local] == [(one.step, one.phi) for one in cluster]
    assert (local[-1].phi > local[0].phi) == (pair.method == "distillm")
    assert [one.loss for one in local] == pytest.approx([one.loss for one in cluster], abs=ROUNDING)
    assert {one.text for one in local} == {"student" if pair.method == "prompts" else "dataset"}
    assert [one.tokens for one in local] == [one.tokens for one in cluster]


def test_the_work_of_generator_and_scorer_is_the_same(pair: Pair) -> None:
    def work(run: Path) -> list[int]:
        counters = [step.work for step in records(run, StepRecord)]
        return [
            sum(one.generated_sequences for one in counters),
            sum(one.generated_tokens for one in counters),
            sum(one.scored_sequences for one in counters),
            sum(one.scored_tokens for one in counters),
        ]

    assert work(pair.local) == work(pair.cluster)


def test_weights_that_are_published_a_step_later_give_other_parameters(config: Path) -> None:
    """The comparison above can tell one version of the generating weights from the next."""
    method = (
        "run.mode=local",
        "schedule={type: fixed, phi: 1, replay_ratio: none}",
        "loss.terms=[{type: forward_kl}]",
        "learner={optimizer: sgd, learning_rate: 0.1}",
    )
    strict, stale = train(
        config,
        strict=method,
        stale=(*method, "rollout.sync_interval=2", "rollout.max_staleness=1"),
    )
    assert distance(weights(strict), weights(stale)) > 100 * ROUNDING
    assert records(stale, StepRecord)[3].fresh_age_max == 1


def test_a_run_on_a_cluster_trains_on_a_mixture_and_probes_the_student_alone(
    config: Path,
) -> None:
    """Sampled, so not comparable token by token with a local run."""
    (run,) = train(
        config,
        mixed=(
            *METHODS["minillm"],
            "learner.steps=6",
            "rollout.sampling.temperature=1",
            "rollout.teacher_mix=0.5",
            "validation.probe_prompts=4",
        ),
    )
    steps, probes = records(run, StepRecord), records(run, ProbeRecord)
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(step.mix.fresh == BATCH_SIZE and not step.skipped for step in steps)
    assert all(math.isnan(step.logprob_gap) for step in steps), "the engine's are the mixture's"
    assert [probe.step for probe in probes] == [0, 4]
    assert all(probe.logprob_gap < 1e-4 for probe in probes), "with the same weights as the learner"


@pytest.mark.usefixtures("local_ray")
def test_data_read_in_process_are_those_that_ray_data_reads(config: Path, tmp_path: Path) -> None:
    rows = [
        {"id": "a", "prompt": "one and two", "response": "three"},
        {"prompt": "", "response": "empty"},
        {"prompt": "what follows", "response": ["one", "two then"]},
        {"prompt": "zero " * 30, "response": "too long"},
    ]
    lines = tmp_path / "rows.jsonl"
    lines.write_text("\n\n".join([*map(json.dumps, rows), "{bad"]) + "\n")
    parquet = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": ["is"], "output": ["four"]}), parquet)
    settings = DataConfig(
        train=(lines, config.parent / "train.jsonl", parquet), max_prompt_tokens=24
    )
    tokenizer = AutoTokenizer.from_pretrained(config.parent / "student")
    files = find_files(settings.train, "train")
    renderer = Renderer(tokenizer, settings)
    tokenize = partial(
        tokenizing.tokenize_rows, renderer=renderer, config=settings, require_responses=True
    )
    in_process = tokenizing.map_files(files, tokenize)
    assert in_process.equals(
        ray_data.mapper(stall_timeout_s=60.0, spread_from_bytes=0)(files, tokenize)
    )
    assert in_process["kind"].to_pylist().count(None) == in_process.num_rows - 3
