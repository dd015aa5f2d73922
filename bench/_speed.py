"""Seconds and CPU-seconds a step of one training run after the other, ours and others'.

A run is measured over a window: from the end of step `WARM_UP` to the end of the last one, so that
starting, compiling and the first publication are left out, and everything between steps is in.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml
from _common import REPOSITORY, commit
from _processes import Accounting
from _runs import product
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from distillm_ray.log.metrics import FILE_NAME, read_records
from distillm_ray.log.records import StepRecord, ValidationRecord

TEACHER = REPOSITORY / "models" / "smollm2-135m-instruct"
STUDENT = REPOSITORY / "models" / "smollm2-64m-init"
STUDENT_LAYERS = "0,1,2,3,9,15,21,27,28,29"
DATA = REPOSITORY / "data" / "quickstart"
BATCH_SIZE, MAX_NEW_TOKENS, MAX_PROMPT_TOKENS = 8, 64, 160
WARM_UP = 4  # steps; a multiple of every sync_interval here
OTHERS_PYTHON = REPOSITORY / ".venv-bench" / "bin" / "python"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run. Everything is of the window's steps, divided by their number; memory is a peak."""

    seconds: float
    cpu_seconds: float
    cpu_by_role: dict[str, float] = field(default_factory=dict[str, float])
    response_tokens: float = 0.0  # trained on
    generated_sequences: float = 0.0
    generated_tokens: float = 0.0
    scored_tokens: float = 0.0  # prompts included
    wait_seconds: float = 0.0  # of the learner, for data
    peak_mib_by_role: dict[str, float] = field(default_factory=dict[str, float])
    validation_loss: float | None = None  # after the last step


def prepare() -> None:
    """The quickstart's teacher, and a student of ten of its layers."""
    if not TEACHER.exists():
        subprocess.run(
            [sys.executable, "scripts/prepare_quickstart.py"], cwd=REPOSITORY, check=True
        )
    if not STUDENT.exists():
        log = REPOSITORY / "runs" / "bench" / "init-student.log"
        layers = ("--layers", STUDENT_LAYERS)
        product(log, "init-student", str(TEACHER), str(STUDENT), *layers)


def write_config(path: Path, *, steps: int) -> Path:
    """What all our runs share; each overrides its method and what belongs to it."""
    sampling = {"max_tokens": MAX_NEW_TOKENS}
    pool = {"num_threads": 1}
    tree = {
        "run": {"device": "cpu"},
        "teacher": {"model": str(TEACHER), "max_batch_tokens": 2048, "num_cpus": 0.25, **pool},
        "student": {"model": str(STUDENT)},
        "data": {
            "train": [str(DATA / "train.jsonl")],
            "validation": [str(DATA / "validation.jsonl")],
            "max_prompt_tokens": MAX_PROMPT_TOKENS,
            "max_response_tokens": 96,
        },
        "rollout": {
            "engine": {"type": "vllm", "max_num_seqs": 32},
            "sampling": sampling,
            "num_cpus": 0.5,
            **pool,
        },
        "targets": {"max_bytes": 500_000_000},
        "learner": {
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "max_micro_batch_tokens": 640,
            "learning_rate": 1e-4,
            "warmup_steps": 2,
            "num_cpus": 1,
            **pool,
        },
        "validation": {"interval": steps, "probe_prompts": 0, "max_prompts": 8},
        "evaluation": {"at_end": False},
        "checkpoint": {"interval": steps},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def kept(folder: Path, name: str, measure: Callable[[Path], Measured]) -> Measured:
    """What `measure` finds for a directory of its own, or found before at the same commit."""
    stem = "".join(character if character.isalnum() else "-" for character in name)
    result = folder / commit() / f"{stem}.json"
    if not result.exists():
        result.parent.mkdir(parents=True, exist_ok=True)
        measured = measure(result.with_suffix(""))
        result.write_text(json.dumps(asdict(measured)))
    return Measured(**json.loads(result.read_text()))


def run_ours(config: Path, directory: Path, overrides: Sequence[str]) -> Measured:
    """A `distillm-ray train`, measured."""
    shutil.rmtree(directory, ignore_errors=True)
    log = directory.with_suffix(".log")
    with Accounting() as accounting:
        product(log, "train", str(config), f"run.directory={directory}", *overrides)
    records = read_records(directory / FILE_NAME)
    every = [record for record in records if isinstance(record, StepRecord)]
    losses = [record.loss for record in records if isinstance(record, ValidationRecord)]
    start, steps = every[WARM_UP - 1], every[WARM_UP:]
    # The record of a step is written when the next one may already run, in every step alike.
    begin, end = start.time, steps[-1].time
    cpu = accounting.between(begin, end)

    def a_step(values: Iterable[float]) -> float:
        return sum(values) / len(steps)

    result = Measured(
        seconds=(end - begin) / len(steps),
        cpu_seconds=sum(cpu.values()) / len(steps),
        cpu_by_role={role: used / len(steps) for role, used in cpu.items()},
        response_tokens=a_step(step.loss_tokens for step in steps),
        generated_sequences=a_step(step.work.generated_sequences for step in steps),
        generated_tokens=a_step(step.work.generated_tokens for step in steps),
        scored_tokens=a_step(step.work.scored_tokens for step in steps),
        wait_seconds=a_step(step.wait_seconds for step in steps),
        peak_mib_by_role={
            role: nbytes / 2**20 for role, nbytes in accounting.peak_bytes.items() if nbytes
        },
        validation_loss=losses[-1] if losses else None,
    )
    shutil.rmtree(directory, ignore_errors=True)
    return result


def run_trl(log: Path, *, steps: int) -> Measured:
    """TRL's on-policy trainer (`_trl.py`) in .venv-bench, which `make bench-setup` makes."""
    if not OTHERS_PYTHON.exists():
        raise SystemExit("TRL is not installed: `make bench-setup` does it")
    log.parent.mkdir(parents=True, exist_ok=True)
    output = log.with_suffix(".json")
    command = [str(OTHERS_PYTHON), str(REPOSITORY / "bench" / "_trl.py"), str(steps), str(output)]
    # Both cores for whoever works: its phases follow each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(REPOSITORY)}
    with Accounting() as accounting, log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: see {log}")
    found = json.loads(output.read_text())
    ends, tokens = found["step_ends"], found["response_tokens"]
    begin, end = ends[WARM_UP - 1], ends[-1]
    count = len(ends) - WARM_UP
    cpu = accounting.between(begin, end)
    generated = (tokens[-1] - tokens[WARM_UP - 1]) / count
    return Measured(
        seconds=(end - begin) / count,
        cpu_seconds=sum(cpu.values()) / count,
        cpu_by_role={"one process": sum(cpu.values()) / count},
        response_tokens=generated,
        generated_sequences=BATCH_SIZE,
        generated_tokens=generated,
        peak_mib_by_role={
            "one process": sum(accounting.peak_bytes.values()) / 2**20,
        },
    )


def median_of(runs: Sequence[Measured], name: str) -> float:
    """A figure's median over repetitions."""
    return statistics.median(getattr(run, name) for run in runs)


def ratio(one: Sequence[Measured], other: Sequence[Measured], name: str) -> float:
    """The median over repetitions of `one / other`, each pair from the same round."""
    pairs = zip(one, other, strict=True)
    return statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs)


def show(title: str, found: dict[str, list[Measured]], *, against: str) -> None:
    """A table: a row a run, medians; speed and cost are also given against one of them."""
    table = Table("", title=title)
    names = ("s/step", "tokens/s", "CPU-s/step", "learn", "generate", "score", "other")
    names += ("fresh", "tokens gen.", "scored", "wait s", f"speed / {against}", f"cost / {against}")
    for name in names:
        table.add_column(name, justify="right")
    for name, runs in found.items():
        roles = [
            statistics.median(sum(run.cpu_by_role.get(role, 0.0) for role in group) for run in runs)
            for group in (("learners", "one process"), ("generators",), ("scorers",))
        ]
        cost = median_of(runs, "cpu_seconds")
        speed = statistics.median(run.response_tokens / run.seconds for run in runs)
        cells = [f"{median_of(runs, 'seconds'):.2f}", f"{speed:.0f}", f"{cost:.2f}"]
        cells += [f"{used:.2f}" for used in (*roles, cost - sum(roles))]
        cells += [f"{median_of(runs, 'generated_sequences'):.1f}"]
        cells += [f"{median_of(runs, 'generated_tokens'):.0f}"]
        cells += [f"{median_of(runs, 'scored_tokens'):.0f}"]
        cells += [f"{median_of(runs, 'wait_seconds'):.2f}"]
        if against in found:
            cells += [f"{ratio(found[against], runs, 'seconds'):.2f}"]
            cells += [f"{ratio(runs, found[against], 'cpu_seconds'):.2f}"]
        table.add_row(name, *cells)
    Console(width=160).print(table)


def draw(found: dict[str, list[Measured]], path: Path) -> None:
    """Two rows of bars: steps a second, and CPU-seconds a step by role."""
    figure = Figure(figsize=(9, 0.45 * len(found) + 1.6), dpi=120)
    left, right = figure.subplots(1, 2, sharey=True)
    names = list(found)[::-1]
    speeds = [1.0 / median_of(found[name], "seconds") for name in names]
    bars = left.barh(names, speeds, color="tab:blue")
    left.bar_label(bars, fmt="%.2f", padding=3)
    left.set_xlabel("steps a second")
    left.set_xlim(0, 1.15 * max(speeds))
    roles = sorted({role for runs in found.values() for run in runs for role in run.cpu_by_role})
    offset = [0.0] * len(names)
    for role in roles:
        used = [
            statistics.median(run.cpu_by_role.get(role, 0.0) for run in found[name])
            for name in names
        ]
        right.barh(names, used, left=offset, label=role)
        offset = [a + b for a, b in zip(offset, used, strict=True)]
    right.set_xlabel("CPU-seconds a step")
    right.set_xlim(0, 1.15 * max(offset))
    for index, total in enumerate(offset):
        right.text(total, index, f" {total:.1f}", va="center")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path)
