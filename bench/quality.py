"""Methods on real text: SmolLM2-135M into a student of 106M, at equal steps and at equal cost.

    python bench/quality.py [--quick] [--seeds 3] [--jobs 2] [--methods sft,kd,...]
    python bench/quality.py --name NAME --train FILE --validation FILE --test FILE

The first form takes the quickstart's data, whose responses are the teacher's own. The second takes
pairs that people wrote, JSONL with `prompt` and `response`, and fine-tunes the teacher on them. The
student is healed by supervised fine-tuning before any method starts, as in the DistiLLM paper.

Every run is `distillm-ray train method=NAME` with vLLM generators, on-policy baselines included,
and every model is scored by `distillm-ray evaluate`, greedy. Cost is the CPU seconds of all roles
while they train, from the run's own log. The teacher's responses for seqkd are written before the
runs and not counted.

The learning rate is constant after its warm-up, so that a checkpoint is the end of a shorter run.
Each method with each seed is one run: it has a checkpoint after the steps that all take, and one
whose cost is nearest to that of DistiLLM with skew KL and the same seed.

Finished runs are kept in runs/quality-NAME; the same command continues. The results are written
again whenever all methods have one more seed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from _common import REPOSITORY, RESULTS, write
from _runs import draw_quality, once, product, spread
from rich.console import Console
from rich.table import Table

from distillm_ray.evaluation.results import EVALUATION_FILE
from distillm_ray.log.metrics import FILE_NAME, read_records
from distillm_ray.log.records import CostRecord, Record, StepRecord
from distillm_ray.methods import METHODS
from distillm_ray.types import TRAINING

TEACHER = REPOSITORY / "models" / "smollm2-135m-instruct"
STUDENT = REPOSITORY / "models" / "smollm2-106m-init"
# The budget of equal cost is that of the first.
DISTILLM = "distillm"
RUNS: dict[str, tuple[str, ...]] = {
    "sft": ("method=sft",),
    "kd": ("method=kd",),
    "seqkd": ("method=seqkd",),
    "gkd": ("method=gkd",),
    "minillm": ("method=minillm",),
    DISTILLM: ("method=distillm", "schedule.start=0.1"),
    "distillm-srkl": (
        "method=distillm",
        "schedule.start=0.1",
        "loss.terms=[{type: skew_reverse_kl}]",
    ),
}


@dataclass(frozen=True)
class Size:
    """How much of everything. The batch is in sequences."""

    teacher_steps: int = 60
    healing_steps: int = 40
    steps: int = 30
    batch_size: int = 12
    train_rows: int = 600  # of those that teacher and healing see
    validation_rows: int = 64
    test_rows: int = 150


QUICK = Size(teacher_steps=0, healing_steps=10, steps=10, test_rows=40, validation_rows=32)
CHECKPOINT_INTERVAL = 5
EQUAL_STEPS, EQUAL_COST = "equal steps", "equal cost"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A checkpoint of a run. Scores are of the test prompts, 0 to 100."""

    method: str
    seed: int
    compared_at: str
    steps: int
    validation_loss: float
    rouge_l: float
    exact_match: float
    cpu_seconds: float
    generated_tokens: int
    scored_tokens: int


@dataclass(frozen=True, kw_only=True)
class Laboratory:
    """A directory of runs that share data, models and sizes."""

    directory: Path
    given: dict[str, Path]  # train, validation, test
    size: Size
    tune_teacher: bool

    @property
    def files(self) -> dict[str, Path]:
        """The parts of the given files that the runs use."""
        return {name: self.directory / f"{name}.jsonl" for name in self.given}

    @property
    def config(self) -> Path:
        """The config that every run extends by its method."""
        return self.directory / "quality.yaml"

    @property
    def teacher(self) -> Path:
        """The teacher of all runs."""
        return self.directory / "teacher" / "model" if self.tune_teacher else TEACHER

    def tree(self) -> dict[str, Any]:
        """What all runs share."""
        sampling = {"max_tokens": 96}
        return {
            "run": {"device": "cpu"},
            "teacher": {
                "model": str(self.teacher),
                "max_batch_tokens": 2048,
                "num_cpus": 0.25,
                "num_threads": 1,
            },
            "student": {"model": str(self.directory / "healed" / "model")},
            "data": {
                **{name: [str(path)] for name, path in self.files.items()},
                "max_prompt_tokens": 160,
                "max_response_tokens": 96,
            },
            "rollout": {
                "engine": {"type": "vllm", "max_num_seqs": 32},
                "sampling": sampling,
                "num_cpus": 0.5,
                "num_threads": 1,
            },
            "targets": {"max_bytes": 500_000_000},
            "learner": {
                "steps": self.size.steps,
                "batch_size": self.size.batch_size,
                "max_micro_batch_tokens": 1024,
                "learning_rate": 1e-4,
                "min_learning_rate_ratio": 1.0,
                "warmup_steps": 5,
                "num_cpus": 1,
            },
            "validation": {"interval": 10, "probe_prompts": 0},
            "evaluation": {
                "at_end": False,
                "seeds": [0],
                "sampling": {**sampling, "temperature": 0.0},
            },
            "generate": {"sampling": sampling},
            "checkpoint": {"interval": CHECKPOINT_INTERVAL, "keep": 1000},
        }

    def train(self, directory: Path, *overrides: str) -> None:
        """A run, or the rest of one that has been given more steps."""
        command = ("train", str(self.config), f"run.directory={directory}", *overrides)
        product(directory.with_suffix(".log"), *command)

    def evaluate(self, model: Path, output: Path) -> dict[str, Any]:
        """The scores of a model directory, as `evaluation.json` has them."""
        if not (output / EVALUATION_FILE).exists():
            product(
                output.with_suffix(".evaluate.log"),
                *("evaluate", str(self.config), f"run.directory={output}"),
                *("--model", str(model), "--output", str(output)),
            )
        models = json.loads((output / EVALUATION_FILE).read_text())["models"]
        (scores,) = models.values()
        return scores

    def prepare(self) -> None:
        """The rows, the fine-tuned teacher and the healed student."""
        if not STUDENT.exists():
            subprocess.run(
                [sys.executable, "scripts/prepare_quickstart.py"], cwd=REPOSITORY, check=True
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(self.tree()))
        counts = (self.size.train_rows, self.size.validation_rows, self.size.test_rows)
        for (name, path), count in zip(self.given.items(), counts, strict=True):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            chosen = random.Random(0).sample(lines, min(count, len(lines)))
            self.files[name].write_text("".join(chosen), encoding="utf-8")
        sft = ("method=sft", "teacher=null", "validation.interval=30", "checkpoint.interval=1000")
        every_row = f"data.train=[{self.given['train']}]"
        for _ in once(self.directory / "teacher.done"):
            if self.tune_teacher:
                self.train(
                    self.directory / "teacher",
                    *(*sft, every_row, f"student.model={TEACHER}", "run.seed=100"),
                    f"learner.steps={self.size.teacher_steps}",
                )
        for _ in once(self.directory / "healed.done"):
            self.train(
                self.directory / "healed",
                *(*sft, every_row, f"student.model={STUDENT}", "run.seed=101"),
                f"learner.steps={self.size.healing_steps}",
            )

    def respond(self) -> Path:
        """The teacher's responses to the training prompts."""
        path = self.directory / "responses.jsonl"
        if not path.exists():
            product(
                self.directory / "responses.log",
                *("generate", str(self.config), f"run.directory={self.directory}"),
                *("--model", str(self.teacher), "--prompts", str(self.files["train"])),
                *("--output", str(path)),
            )
        return path

    def run(self, method: str, seed: int, budget: Future[list[Outcome]] | None) -> list[Outcome]:
        """One method with one seed, compared at equal steps and, given a budget, at equal cost.

        Args:
            budget: the run whose cost is to be met.
        """
        directory = self.directory / method / f"seed-{seed}"
        result = directory.with_suffix(".json")
        if not result.exists():
            shutil.rmtree(directory, ignore_errors=True)  # interrupted
            overrides = [*RUNS[method], f"run.seed={seed}"]
            if METHODS[method.partition("-")[0]].get("data", {}).get("responses") == "teacher":
                overrides.append(f"data.train=[{self.respond()}]")
            steps = self.size.steps
            self.train(directory, *overrides, f"learner.steps={steps}")
            outcomes = [self.outcome(EQUAL_STEPS, method, seed, steps)]
            if budget is not None:
                (limit,) = (one.cpu_seconds for one in budget.result())
                cost = outcomes[0].cpu_seconds
                if cost < limit:
                    more = -(-steps * limit / cost // CHECKPOINT_INTERVAL) * CHECKPOINT_INTERVAL
                    self.train(directory, *overrides, f"learner.steps={int(more)}")
                nearest = step_of_cost(list(read_records(directory / FILE_NAME)), limit)
                outcomes.append(self.outcome(EQUAL_COST, method, seed, nearest))
            result.write_text(json.dumps([asdict(one) for one in outcomes]))
            shutil.rmtree(directory / "checkpoints")
        return [Outcome(**one) for one in json.loads(result.read_text())]

    def outcome(self, compared_at: str, method: str, seed: int, step: int) -> Outcome:
        """Evaluate the checkpoint after `step`."""
        directory = self.directory / method / f"seed-{seed}"
        model, scored = directory / f"model-step-{step}", directory / f"step-{step}"
        if not model.exists():
            command = ("export", str(directory), "--checkpoint", str(step))
            product(scored.with_suffix(".export.log"), *command)
        scores = self.evaluate(model, scored)
        shutil.rmtree(model)
        records = list(read_records(directory / FILE_NAME))
        work = [one.work for one in records if isinstance(one, StepRecord) and one.step <= step]
        return Outcome(
            compared_at=compared_at,
            method=method,
            seed=seed,
            steps=step,
            validation_loss=scores["validation_loss"],
            rouge_l=scores["rouge_l"]["mean"],
            exact_match=scores["exact_match"]["mean"],
            cpu_seconds=cost_at(records, step),
            generated_tokens=sum(one.generated_tokens for one in work),
            scored_tokens=sum(one.scored_tokens for one in work),
        )


def cost_at(records: Sequence[Record], step: int) -> float:
    """CPU seconds of all roles from the first step to the end of `step`."""
    costs = [one for one in records if isinstance(one, CostRecord) and one.phase == TRAINING]
    spent = np.cumsum([sum(role.cpu_seconds for role in one.roles.values()) for one in costs])
    return float(np.interp(step, [0, *(one.step for one in costs)], [0.0, *spent]))


def step_of_cost(records: Sequence[Record], limit: float) -> int:
    """The step with a checkpoint whose cost is nearest to `limit`."""
    last = max(one.step for one in records if isinstance(one, StepRecord))
    steps = range(CHECKPOINT_INTERVAL, last + 1, CHECKPOINT_INTERVAL)
    return min(steps, key=lambda step: abs(cost_at(records, step) - limit))


def table_of(title: str, by_method: dict[str, list[Outcome]]) -> Table:
    """A row a method, mean ± standard deviation over seeds."""
    names = ("steps", "validation loss", "ROUGE-L", "exact %", "CPU-s", "generated", "scored")
    table = Table("method", title=title)
    for name in names:
        table.add_column(name, justify="right")
    for method, outcomes in by_method.items():
        table.add_row(
            method,
            "/".join(str(steps) for steps in sorted({one.steps for one in outcomes})),
            spread([one.validation_loss for one in outcomes], 4),
            spread([one.rouge_l for one in outcomes], 1),
            spread([one.exact_match for one in outcomes], 1),
            f"{statistics.median(one.cpu_seconds for one in outcomes):.0f}",
            f"{statistics.median(one.generated_tokens for one in outcomes):,.0f}",
            f"{statistics.median(one.scored_tokens for one in outcomes):,.0f}",
        )
    return table


def report(
    name: str,
    lab: Laboratory,
    outcomes: Sequence[Outcome],
    ends: dict[str, dict[str, Any]],
    jobs: int,
) -> None:
    """Tables, picture and JSON of the seeds so far.

    Args:
        ends: the scores of the teacher and of the student before any method.
    """
    for compared_at in (EQUAL_STEPS, EQUAL_COST):
        by_method: dict[str, list[Outcome]] = {}
        for one in outcomes:
            # Its only checkpoint is the budget itself.
            if one.compared_at == compared_at or one.method == DISTILLM:
                by_method.setdefault(one.method, []).append(one)
        Console(width=120).print(table_of(compared_at, by_method))
    points: dict[str, list[tuple[float, float]]] = {}
    for one in outcomes:
        points.setdefault(one.method, []).append((one.cpu_seconds, one.rouge_l))
    draw_quality(
        points,
        {title: scores["rouge_l"]["mean"] for title, scores in ends.items()},
        RESULTS / f"{name}.png",
        xlabel="CPU-seconds of all roles",
        ylabel="ROUGE-L",
    )
    write(
        name,
        {
            "size": asdict(lab.size),
            "jobs": jobs,
            **{title.replace(" ", "_"): scores for title, scores in ends.items()},
            "outcomes": [asdict(one) for one in outcomes],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods on real text.")
    parser.add_argument("--quick", action="store_true", help="ten minutes: few steps, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--methods", help="default: all of RUNS, with --quick sft,kd,distillm")
    parser.add_argument("--name", default="quickstart", help="of the data")
    for part in ("train", "validation", "test"):
        parser.add_argument(f"--{part}", type=Path)
    arguments = parser.parse_args()
    given = [arguments.train, arguments.validation, arguments.test]
    if any(given) and not all(given):
        parser.error("--train, --validation and --test come together")
    own = all(given)
    if own and arguments.name == "quickstart":
        parser.error("--name is needed with --train: the name of the data")
    folder = REPOSITORY / "data" / "quickstart"
    size = QUICK if arguments.quick else Size()
    name = f"quality_{arguments.name}{'_quick' if arguments.quick else ''}"
    lab = Laboratory(
        directory=REPOSITORY / "runs" / name.replace("_", "-"),
        given={
            part: (path or folder / f"{part}.jsonl").absolute()
            for part, path in zip(("train", "validation", "test"), given, strict=True)
        },
        size=size,
        tune_teacher=own and size.teacher_steps > 0,
    )
    chosen = arguments.methods or (f"sft,kd,{DISTILLM}" if arguments.quick else ",".join(RUNS))
    methods = [method.strip() for method in chosen.split(",")]
    if unknown := [method for method in methods if method not in RUNS]:
        parser.error(f"--methods: {unknown} is none of {', '.join(RUNS)}")
    if DISTILLM not in methods:
        parser.error(f"--methods: {DISTILLM} is needed, its cost is the budget of the others")
    methods.sort(key=[DISTILLM, *RUNS].index)  # the others wait for its cost
    lab.prepare()
    ends = {
        "teacher": lab.evaluate(lab.teacher, lab.directory / "teacher-scores"),
        "student before": lab.evaluate(
            lab.directory / "healed" / "model", lab.directory / "healed-scores"
        ),
    }
    for title, scores in ends.items():
        print(
            f"{title}: loss {scores['validation_loss']:.4f},"
            f" ROUGE-L {scores['rouge_l']['mean']:.1f},"
            f" exact match {scores['exact_match']['mean']:.1f} %",
            flush=True,
        )
    if "seqkd" in methods:
        lab.respond()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        rounds: list[dict[str, Future[list[Outcome]]]] = []
        for seed in range(1 if arguments.quick else arguments.seeds):
            runs: dict[str, Future[list[Outcome]]] = {}
            for method in methods:
                runs[method] = pool.submit(lab.run, method, seed, runs.get(DISTILLM))
            rounds.append(runs)
        outcomes: list[Outcome] = []
        for runs in rounds:
            for run in runs.values():
                for one in run.result():
                    outcomes.append(one)
                    print(
                        f"{time.strftime('%H:%M')} {one.method}, seed {one.seed},"
                        f" {one.compared_at}, {one.steps} steps: loss {one.validation_loss:.4f},"
                        f" ROUGE-L {one.rouge_l:.1f}, {one.cpu_seconds:.0f} CPU-seconds",
                        flush=True,
                    )
            report(name, lab, outcomes, ends, arguments.jobs)


if __name__ == "__main__":
    main()
