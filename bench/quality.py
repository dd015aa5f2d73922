"""Methods on real text: SmolLM2-135M into a student of 106M, at equal steps and at equal cost.

    python bench/quality.py [--quick] [--seeds 3] [--only-equal-steps] [--methods sft,kd,...]
    python bench/quality.py --name NAME --train FILE --validation FILE --test FILE

The first form takes the quickstart's data, whose responses are the teacher's own. The second takes
pairs that people wrote, JSONL with `prompt` and `response`, and fine-tunes the teacher on them. The
student is healed by supervised fine-tuning before any method starts, as in the DistiLLM paper.

Every run is `distillm-ray train method=NAME` with vLLM generators, on-policy baselines included,
and every model is scored by `distillm-ray evaluate`, greedy. Cost is the CPU seconds of all
processes of a run from its first step on, which other work on the machine changes little. The
teacher's responses for seqkd are written before the runs and not counted. At equal cost, a method
takes as many steps as fit into the CPU seconds of DistiLLM with skew KL.

Finished runs are kept in runs/quality-NAME; the same command continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from _common import REPOSITORY, RESULTS, write
from _runs import draw_quality, once, product, spread, training_cpu_seconds
from rich.console import Console
from rich.table import Table

from distillm_ray.evaluation.results import EVALUATION_FILE
from distillm_ray.log.metrics import FILE_NAME, read_records
from distillm_ray.log.totals import Totals
from distillm_ray.methods import METHODS

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

    teacher_steps: int = 90
    healing_steps: int = 40
    steps: int = 40
    batch_size: int = 24
    test_prompts: int = 200


QUICK = Size(teacher_steps=0, healing_steps=8, steps=10, batch_size=12, test_prompts=50)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run. Scores are of the test prompts, 0 to 100."""

    method: str
    seed: int
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
    files: dict[str, Path]  # train, validation, test
    size: Size
    tune_teacher: bool

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
                "warmup_steps": min(5, self.size.steps - 1),
                "num_cpus": 1,
            },
            "validation": {"interval": 10, "probe_prompts": 0},
            "evaluation": {
                "at_end": False,
                "seeds": [0],
                "sampling": {**sampling, "temperature": 0.0},
                "max_prompts": self.size.test_prompts,
            },
            "generate": {"sampling": sampling},
            "checkpoint": {"interval": 1000},
        }

    def train(self, directory: Path, *overrides: str) -> float:
        """A run; returns the CPU seconds of its training. An interrupted one begins again."""
        shutil.rmtree(directory, ignore_errors=True)
        log = directory.with_suffix(".log")
        log.unlink(missing_ok=True)
        return training_cpu_seconds(
            log, "train", str(self.config), f"run.directory={directory}", *overrides
        )

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
        """The fine-tuned teacher, the healed student, and the teacher's responses."""
        if not STUDENT.exists():
            subprocess.run(
                [sys.executable, "scripts/prepare_quickstart.py"], cwd=REPOSITORY, check=True
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(self.tree()))
        sft = ("method=sft", "teacher=null", "validation.interval=30")
        for _ in once(self.directory / "teacher.done"):
            if self.tune_teacher:
                self.train(
                    self.directory / "teacher",
                    *(*sft, f"student.model={TEACHER}", "run.seed=100"),
                    f"learner.steps={self.size.teacher_steps}",
                )
        for _ in once(self.directory / "healed.done"):
            self.train(
                self.directory / "healed",
                *(*sft, f"student.model={STUDENT}", "run.seed=101"),
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

    def run(self, method: str, seed: int, steps: int) -> Outcome:
        """One method with one seed; a finished run is read."""
        directory = self.directory / method / f"seed-{seed}-steps-{steps}"
        result = directory.with_suffix(".json")
        if not result.exists():
            overrides = [*RUNS[method], f"run.seed={seed}", f"learner.steps={steps}"]
            if METHODS[method.partition("-")[0]].get("data", {}).get("responses") == "teacher":
                overrides.append(f"data.train=[{self.respond()}]")
            cpu_seconds = self.train(directory, *overrides)
            totals = Totals.of(read_records(directory / FILE_NAME))
            scores = self.evaluate(directory / "model", directory)
            outcome = Outcome(
                method=method,
                seed=seed,
                steps=steps,
                validation_loss=scores["validation_loss"],
                rouge_l=scores["rouge_l"]["mean"],
                exact_match=scores["exact_match"]["mean"],
                cpu_seconds=cpu_seconds,
                generated_tokens=totals.work.generated_tokens,
                scored_tokens=totals.work.scored_tokens,
            )
            result.write_text(json.dumps(asdict(outcome)))
            shutil.rmtree(directory / "checkpoints", ignore_errors=True)
        return Outcome(**json.loads(result.read_text()))


def table_of(title: str, by_method: dict[str, list[Outcome]]) -> Table:
    """A row a method, mean ± standard deviation over seeds."""
    names = ("steps", "validation loss", "ROUGE-L", "exact %", "CPU-s", "generated", "scored")
    table = Table("method", title=title)
    for name in names:
        table.add_column(name, justify="right")
    for method, outcomes in by_method.items():
        table.add_row(
            method,
            str(outcomes[0].steps),
            spread([one.validation_loss for one in outcomes], 4),
            spread([one.rouge_l for one in outcomes], 1),
            spread([one.exact_match for one in outcomes], 1),
            f"{statistics.median(one.cpu_seconds for one in outcomes):.0f}",
            f"{statistics.median(one.generated_tokens for one in outcomes):,.0f}",
            f"{statistics.median(one.scored_tokens for one in outcomes):,.0f}",
        )
    return table


def run_all(lab: Laboratory, steps: dict[str, int], seeds: int) -> dict[str, list[Outcome]]:
    """Every method, seed by seed, so that an interrupted benchmark has whole rounds."""
    found: dict[str, list[Outcome]] = {method: [] for method in steps}
    for seed in range(seeds):
        for method, count in steps.items():
            outcome = lab.run(method, seed, count)
            found[method].append(outcome)
            print(
                f"{time.strftime('%H:%M')} {method}, seed {seed}, {count} steps:"
                f" loss {outcome.validation_loss:.4f}, ROUGE-L {outcome.rouge_l:.1f},"
                f" {outcome.cpu_seconds:.0f} CPU-seconds",
                flush=True,
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Methods on real text.")
    parser.add_argument("--quick", action="store_true", help="ten minutes: few steps, one seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-equal-steps", action="store_true", help="no runs of equal cost")
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
        files={
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
    seeds = 1 if arguments.quick else arguments.seeds
    started = time.monotonic()
    lab.prepare()
    before = lab.evaluate(lab.directory / "healed" / "model", lab.directory / "healed")
    teacher = lab.evaluate(lab.teacher, lab.directory / "teacher")
    for title, scores in (("teacher", teacher), ("student before", before)):
        print(
            f"{title}: loss {scores['validation_loss']:.4f},"
            f" ROUGE-L {scores['rouge_l']['mean']:.1f},"
            f" exact match {scores['exact_match']['mean']:.1f} %",
            flush=True,
        )
    by_method = run_all(lab, dict.fromkeys(methods, size.steps), seeds)
    tables = [table_of(f"equal steps: {size.steps}", by_method)]
    equal_cost: dict[str, list[Outcome]] = {}
    if DISTILLM in methods and not arguments.quick and not arguments.only_equal_steps:
        cost = {
            method: statistics.median(one.cpu_seconds for one in outcomes)
            for method, outcomes in by_method.items()
        }
        steps = {
            method: max(10, round(size.steps * cost[DISTILLM] / cost[method])) for method in methods
        }
        equal_cost = run_all(lab, steps, seeds)
        tables.append(table_of(f"equal cost: {cost[DISTILLM]:.0f} CPU-seconds", equal_cost))
    for table in tables:
        Console(width=120).print(table)
    draw_quality(
        {
            method: [(one.cpu_seconds, one.rouge_l) for one in outcomes]
            for method, outcomes in by_method.items()
        },
        {"student before": before["rouge_l"]["mean"], "teacher": teacher["rouge_l"]["mean"]},
        RESULTS / f"{name}.png",
        xlabel="CPU-seconds of all roles",
        ylabel="ROUGE-L",
    )
    write(
        name,
        {
            "size": asdict(size),
            "seeds": seeds,
            "teacher": teacher,
            "student_before": before,
            "equal_steps": [asdict(one) for found in by_method.values() for one in found],
            "equal_cost": [asdict(one) for found in equal_cost.values() for one in found],
            "seconds": time.monotonic() - started,
        },
    )


if __name__ == "__main__":
    main()
