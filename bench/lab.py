"""The laboratory: every method on a task where differences show, at equal steps and equal cost.

    python bench/lab.py [--quick] [--seeds 3] [--jobs 2] [--methods kd,distillm]

The task is column addition with written-out carries: some fifty tokens, each of which must be
right. The teacher (1.2M parameters) is trained on many rows in which one column in ten is wrong, so
it knows more than any row says. The student (0.14M) starts from supervised fine-tuning on rows of
the same kind, as in the DistiLLM paper, and is then trained by `distillm-ray train method=NAME` on
few other rows. All models are trained by the product, in one process each (`run.mode=local`).

Variants of DistiLLM exchange one part of it. At equal cost, each method takes as many steps as fit
into the CPU time of DistiLLM's run.

Runs that are finished are kept in runs/lab; the same command continues. Exact match is of the final
sum, greedy, on problems that no training saw and without wrong columns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from _common import RESULTS, write
from _runs import draw_quality, once, product, spread
from rich.console import Console
from rich.table import Table
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from distillm_ray.log.metrics import FILE_NAME, read_records
from distillm_ray.log.records import StepRecord, ValidationRecord
from distillm_ray.methods import METHODS

DIGITS = 6
WRONG_COLUMNS = 0.1
SPECIAL = ("<unk>", "<user>", "<assistant>", "<end>")
WORDS = (*"0123456789", "+", ":", ";", "=")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
TEACHER = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "heads": 4}
STUDENT = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "heads": 2}


# DistiLLM with one part exchanged, for the paper's claims.
VARIANTS: dict[str, tuple[str, ...]] = {
    "distillm, phi 0": ("method=distillm", "schedule={type: fixed, phi: 0}"),
    "distillm, on-policy": (
        "method=distillm",
        "schedule={type: fixed, phi: 1, replay_ratio: none}",
    ),
    "distillm, forward KL": ("method=distillm", "loss.terms=[{type: forward_kl}]"),
    "distillm, reverse KL": ("method=distillm", "loss.terms=[{type: reverse_kl}]"),
    "distillm, JSD": ("method=distillm", "loss.terms=[{type: jensen_shannon}]"),
    "distillm, SRKL": ("method=distillm", "loss.terms=[{type: skew_reverse_kl}]"),
}


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    teacher_rows: int = 20_000
    teacher_steps: int = 1400
    initial_rows: int = 2000
    rows: int = 300
    initial_steps: int = 800
    steps: int = 400
    batch_size: int = 32
    test_problems: int = 400


QUICK = Size(teacher_steps=1000, initial_rows=3000, initial_steps=700, steps=100, test_problems=200)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run."""

    method: str
    seed: int
    steps: int
    exact_match: float  # percent
    validation_loss: float
    cpu_seconds: float  # of the whole process, its start included
    generated_tokens: int
    scored_tokens: int


# ---- the task ------------------------------------------------------------------------------------


def problem(rng: random.Random, *, wrong: float) -> dict[str, str]:
    """A row: `1 2 + 3 9` and its columns from the right, then `=` and the sum."""
    a, b = (rng.randrange(10 ** (DIGITS - 1), 10**DIGITS) for _ in range(2))
    carry, columns, digits = 0, [], []
    for place in range(DIGITS):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        digit = total % 10
        if rng.random() < wrong:
            digit = (digit + rng.randrange(1, 10)) % 10
        columns.append(f"{x} {y} {carry} : {digit} {total // 10}")
        carry = total // 10
        digits.append(digit)
    answer = " ".join(map(str, [carry, *reversed(digits)]))
    prompt = f"{' '.join(str(a))} + {' '.join(str(b))}"
    return {"prompt": prompt, "response": f"{' ; '.join(columns)} = {answer}"}


def problems(seed: str, count: int, *, wrong: float) -> list[dict[str, str]]:
    """Different problems for different seeds: a million times a million pairs."""
    rng = random.Random(seed)
    return [problem(rng, wrong=wrong) for _ in range(count)]


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_model(directory: Path, sizes: dict[str, int], *, seed: int) -> None:
    """A Llama with random weights and the task's tokenizer."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(directory)
    torch.manual_seed(seed)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_hidden_layers=sizes["num_hidden_layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["heads"],
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<end>"),
        )
    ).save_pretrained(directory)


@torch.inference_mode()
def exact_match(directory: Path, rows: Sequence[dict[str, str]]) -> float:
    """Percent of the rows whose final sum the model writes, greedy, in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    right = 0
    for start in range(0, len(rows), 100):
        batch = rows[start : start + 100]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["prompt"]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for row in batch
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=9 * DIGITS + 12, do_sample=False)
        said = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right += sum(
            text.rpartition("=")[2].split() == row["response"].rpartition("=")[2].split()
            for text, row in zip(said, batch, strict=True)
        )
    return 100.0 * right / len(rows)


# ---- runs ----------------------------------------------------------------------------------------


def config(lab: Path, size: Size) -> dict[str, Any]:
    """What all runs share."""
    return {
        "run": {"mode": "local", "device": "cpu"},
        "student": {"model": str(lab / "student-init"), "dtype": "float32"},
        "teacher": {"model": str(lab / "teacher" / "model"), "dtype": "float32"},
        "data": {
            "train": [str(lab / "train.jsonl")],
            "validation": [str(lab / "validation.jsonl")],
            "max_prompt_tokens": 2 * DIGITS + 8,
            "max_response_tokens": 9 * DIGITS + 12,
        },
        "rollout": {
            "engine": {"type": "transformers", "max_batch_size": 64},
            "dtype": "float32",
        },
        "learner": {
            "steps": size.steps,
            "batch_size": size.batch_size,
            "max_micro_batch_tokens": 4096,
            "learning_rate": 1e-3,
            "warmup_steps": 20,
            "num_threads": 1,
        },
        "validation": {"interval": 50},
        "evaluation": {"at_end": False},
    }


def train(path: Path, directory: Path, *overrides: str) -> float:
    """Run the product; returns the CPU seconds of its process, with all of its threads."""
    log = directory.with_suffix(".log")
    return product(log, "train", str(path), f"run.directory={directory}", *overrides, threads=1)


def prepare(lab: Path, size: Size) -> Path:
    """Data, the trained teacher, and the student after supervised fine-tuning; the config."""
    lab.mkdir(parents=True, exist_ok=True)
    path = lab / "lab.yaml"
    path.write_text(yaml.safe_dump(config(lab, size)))
    for _ in once(lab / "data.done"):
        write_rows(
            lab / "teacher.jsonl", problems("teacher", size.teacher_rows, wrong=WRONG_COLUMNS)
        )
        write_rows(lab / "initial.jsonl", problems("train", size.initial_rows, wrong=WRONG_COLUMNS))
        write_rows(lab / "train.jsonl", problems("few", size.rows, wrong=WRONG_COLUMNS))
        write_rows(lab / "validation.jsonl", problems("validation", 200, wrong=0.0))
        write_rows(lab / "test.jsonl", problems("test", size.test_problems, wrong=0.0))
        make_model(lab / "teacher-start", TEACHER, seed=1)
        make_model(lab / "student-start", STUDENT, seed=2)
    sft = ("method=sft", "teacher=null", "validation.interval=500")
    for _ in once(lab / "teacher.done"):
        train(
            path,
            lab / "teacher",
            *sft,
            f"student.model={lab / 'teacher-start'}",
            f"data.train=[{lab / 'teacher.jsonl'}]",
            f"learner.steps={size.teacher_steps}",
            "learner.learning_rate=1.5e-3",
        )
    for _ in once(lab / "student.done"):
        train(
            path,
            lab / "initial",
            *sft,
            f"student.model={lab / 'student-start'}",
            f"data.train=[{lab / 'initial.jsonl'}]",
            f"learner.steps={size.initial_steps}",
            "learner.learning_rate=2e-3",
        )
        (lab / "student-init").unlink(missing_ok=True)
        (lab / "student-init").symlink_to(lab / "initial" / "model")
    # The teacher's own responses to the prompts of the training rows, for seqkd and distillm2.
    for _ in once(lab / "responses.done"):
        rows = [json.loads(line) for line in (lab / "train.jsonl").read_text().splitlines()]
        write_rows(lab / "responses.jsonl", responses(lab / "teacher" / "model", rows))
    return path


@torch.inference_mode()
def responses(directory: Path, rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows with a response that the model samples at temperature 1; unfinished ones are out."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    torch.manual_seed(0)
    written = []
    for start in range(0, len(rows), 100):
        batch = rows[start : start + 100]
        texts = [f"<user> {row['prompt']} <end> <assistant>" for row in batch]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        inputs.pop("token_type_ids", None)
        ids = model.generate(**inputs, max_new_tokens=9 * DIGITS + 12, do_sample=True, top_k=0)
        for row, new in zip(batch, ids[:, inputs["input_ids"].shape[1] :], strict=True):
            if (new == tokenizer.eos_token_id).any():
                text = tokenizer.decode(new, skip_special_tokens=True)
                written.append({"prompt": row["prompt"], "response": text})
    return written


def run(path: Path, lab: Path, method: str, seed: int, steps: int) -> Outcome:
    """One method with one seed; a finished run is read."""
    directory = lab / method.replace(", ", "-").replace(" ", "-") / f"seed-{seed}-steps-{steps}"
    result = directory.with_suffix(".json")
    if not result.exists():
        overrides = [*VARIANTS.get(method, (f"method={method}",))]
        overrides += [f"run.seed={seed}", f"learner.steps={steps}"]
        if METHODS.get(method, {}).get("data", {}).get("responses") == "teacher":
            overrides.append(f"data.train=[{lab / 'responses.jsonl'}]")
        cpu_seconds = train(path, directory, *overrides)
        records = list(read_records(directory / FILE_NAME))
        work = [record.work for record in records if isinstance(record, StepRecord)]
        losses = [record.loss for record in records if isinstance(record, ValidationRecord)]
        test = [json.loads(line) for line in (lab / "test.jsonl").read_text().splitlines()]
        outcome = Outcome(
            method=method,
            seed=seed,
            steps=steps,
            exact_match=exact_match(directory / "model", test),
            validation_loss=losses[-1],
            cpu_seconds=cpu_seconds,
            generated_tokens=sum(one.generated_tokens for one in work),
            scored_tokens=sum(one.scored_tokens for one in work),
        )
        result.write_text(json.dumps(asdict(outcome)))
    return Outcome(**json.loads(result.read_text()))


# ---- what is shown -------------------------------------------------------------------------------


def table_of(title: str, by_method: dict[str, list[Outcome]]) -> Table:
    names = ("method", "steps", "exact match, %", "validation loss", "CPU-s", "generated", "scored")
    table = Table(*names, title=title)
    for method, outcomes in by_method.items():
        table.add_row(
            method,
            f"{statistics.median(one.steps for one in outcomes):.0f}",
            spread([one.exact_match for one in outcomes], 1),
            spread([one.validation_loss for one in outcomes], 4),
            f"{statistics.median(one.cpu_seconds for one in outcomes):.0f}",
            f"{statistics.median(one.generated_tokens for one in outcomes):,.0f}",
            f"{statistics.median(one.scored_tokens for one in outcomes):,.0f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Every method on a task where differences show.")
    parser.add_argument("--quick", action="store_true", help="small models and few steps")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    seeds = 1 if arguments.quick else arguments.seeds
    lab = Path("runs") / ("lab-quick" if arguments.quick else "lab")
    started = time.monotonic()
    path = prepare(lab.absolute(), size)
    lab = lab.absolute()
    test = [json.loads(line) for line in (lab / "test.jsonl").read_text().splitlines()]
    teacher, start = (
        exact_match(one, test) for one in (lab / "teacher" / "model", lab / "student-init")
    )
    print(f"exact match: teacher {teacher:.1f} %, student before {start:.1f} %", flush=True)
    methods = arguments.methods.split(",")

    def run_all(steps: dict[str, int]) -> dict[str, list[Outcome]]:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            futures = [
                (method, pool.submit(run, path, lab, method, seed, count))
                for seed in range(seeds)
                for method, count in steps.items()
            ]
            found: dict[str, list[Outcome]] = {method: [] for method in steps}
            for method, future in futures:
                outcome = future.result()
                found[method].append(outcome)
                print(f"{method} seed {outcome.seed}: {outcome.exact_match:.1f} %", flush=True)
        return found

    by_method = run_all(dict.fromkeys(methods, size.steps))
    tables = [table_of(f"equal steps: {size.steps}", by_method)]
    at_equal_cost: dict[str, list[Outcome]] = {}
    variants: dict[str, list[Outcome]] = {}
    if "distillm" in methods:
        variants = run_all(dict.fromkeys(VARIANTS, size.steps))
        tables.append(table_of(f"variants of distillm, equal steps: {size.steps}", variants))
        cost = {
            method: statistics.median(one.cpu_seconds for one in outcomes)
            for method, outcomes in by_method.items()
        }
        budget = cost["distillm"]
        steps = {
            method: max(30, round(size.steps * budget / cost[method], -1)) for method in methods
        }
        at_equal_cost = run_all({method: int(count) for method, count in steps.items()})
        tables.append(table_of(f"equal cost: {budget:.0f} CPU-seconds", at_equal_cost))
    for table in tables:
        Console(width=120).print(table)
    name = "lab_quick" if arguments.quick else "lab"
    draw_quality(
        {
            method: [(one.cpu_seconds, one.exact_match) for one in outcomes]
            for method, outcomes in by_method.items()
        },
        {"student before": start, "teacher": teacher},
        RESULTS / f"{name}.png",
        xlabel="CPU-seconds of a run",
        ylabel="exact match, %",
    )
    write(
        name,
        {
            "size": asdict(size),
            "jobs": arguments.jobs,
            "teacher": teacher,
            "student_before": start,
            "equal_steps": [asdict(one) for found in by_method.values() for one in found],
            "variants": [asdict(one) for found in variants.values() for one in found],
            "equal_cost": [asdict(one) for found in at_equal_cost.values() for one in found],
            "seconds": time.monotonic() - started,
        },
    )


if __name__ == "__main__":
    main()
