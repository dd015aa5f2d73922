"""A complete job that starts in seconds: two tiny Llamas, a few rows of data, the command line.

Every process that a `Driver` starts, directly or through Ray, carries a mark in its environment, so
that a test can find and count its own processes and no others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distillm_ray.log.metrics import FILE_NAME, read_records
from distillm_ray.log.records import CheckpointRecord, Record, StepRecord
from tests import make

MARK = "DISTILLM_TEST_MARK"
POLL_S = 0.05
LIMIT_S = 400  # of any wait; a run takes a tenth of it on an idle machine
END = "<end>"
SPECIAL = ("<unk>", "<user>", "<assistant>", END)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (*NUMBERS, "and", "then", "is", "what", "follows")
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
NUM_TRAIN = 24


def make_model(directory: Path, *, seed: int) -> None:
    """A Llama of two layers, width 32, with a tokenizer of one id a word."""
    make.tokenizer(SPECIAL, WORDS, end=END, chat_template=CHAT).save_pretrained(directory)
    make.llama(
        seed=seed,
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=1,  # vLLM's CPU attention wants heads of 32
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index(END),
    ).save_pretrained(directory)


def make_rows(path: Path, count: int, *, start: int) -> None:
    """Prompts of number words. The response to each is the words of the numbers that come next."""
    rows = []
    for index in range(start, start + count):
        asked = [NUMBERS[(index // 7**place + place) % 10] for place in range(2 + index % 3)]
        response = [NUMBERS[(NUMBERS.index(word) + 1) % 10] for word in asked]
        prompt = f"what follows {' and '.join(asked)}"
        rows.append({"id": f"q{index}", "prompt": prompt, "response": " then ".join(response)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_corpus(path: Path, count: int) -> None:
    """Documents that count upwards from different numbers."""
    texts = [
        " and ".join(NUMBERS[(start + offset) % 10] for offset in range(9 + start % 4))
        for start in range(count)
    ]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def make_config(directory: Path, *, steps: int, batch_size: int) -> Path:
    """Models, data and a config for them, with `run` beside it; returns the config's path."""
    make_model(directory / "teacher", seed=1)
    make_model(directory / "student", seed=2)
    make_rows(directory / "train.jsonl", NUM_TRAIN, start=0)
    make_rows(directory / "validation.jsonl", 6, start=100)
    tree = {
        "run": {
            "directory": str(directory / "run"),
            "device": "cpu",
            "startup_timeout_s": LIMIT_S,
            "log_rollout_ids": True,
        },
        "teacher": {"model": str(directory / "teacher"), "dtype": "float32"},
        "student": {"model": str(directory / "student"), "dtype": "float32"},
        "data": {
            "train": [str(directory / "train.jsonl")],
            "validation": [str(directory / "validation.jsonl")],
            "max_prompt_tokens": 24,
            "max_response_tokens": 16,
        },
        # The draws do not depend on any loss, so that two runs can be compared.
        "schedule": {"type": "fixed", "phi": 0.6, "replay_ratio": "constant"},
        "rollout": {
            "engine": {"type": "transformers"},
            "dtype": "float32",
            "lookahead": 2,
            "sync_interval": 2,
            "max_staleness": 2,
        },
        "targets": {"max_bytes": 20_000_000},
        "learner": {
            "steps": steps,
            "batch_size": batch_size,
            "max_micro_batch_tokens": 128,
            "learning_rate": 1e-3,
        },
        "validation": {"interval": 5, "probe_prompts": 2},
        "evaluation": {
            "at_end": False,
            "sampling": {"temperature": 0.0},
            "student": {"engine": {"type": "transformers"}, "num_cpus": 0.25, "num_threads": 1},
            "teacher": {"engine": {"type": "transformers"}, "num_cpus": 0.25, "num_threads": 1},
            "held_out_loss": {"num_cpus": 0.25, "num_threads": 1},
        },
        "generate": {"engine": {"type": "transformers"}, "num_cpus": 0.25, "num_threads": 1},
        "checkpoint": {"interval": 2},
    }
    for section in ("teacher", "rollout", "learner"):
        tree[section] |= {"num_cpus": 0.25, "num_threads": 1}
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def clean_environment() -> dict[str, str]:
    """The environment of this process without the variables that would point Ray to a cluster."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "PYTEST_")) and name != "PYTHONDONTWRITEBYTECODE"
    }


@dataclass(frozen=True, slots=True)
class Process:
    """A process that a test has started."""

    pid: int
    title: str


def marked_processes(mark: str) -> list[Process]:
    """Every living process with this mark, also those whose parent has ended."""
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() not in (directory / "environ").read_bytes().split(b"\0"):
                continue
            title = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it has ended, or belongs to the kernel
            continue
        found.append(Process(pid=int(directory.name), title=title.strip()))
    return found


class Driver:
    """A `distillm-ray` command in its own process, killed at exit with all processes it started."""

    def __init__(self, *arguments: str, log: Path, environment: Mapping[str, str] | None = None):
        self.mark = uuid.uuid4().hex
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "distillm_ray.cli", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**clean_environment(), **(environment or {}), MARK: self.mark},
            )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        kill_marked(self.mark)
        self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the driver alone."""
        self._process.send_signal(number)

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> int:
        """Wait for the end; returns the exit code."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s:g} s:\n{self.output()}") from None

    def wait_for(self, condition: Callable[[], bool], timeout_s: float) -> None:
        """Wait until the condition holds; fails if the driver ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self._process.poll() is None, f"ended before:\n{self.output()}"
            assert time.monotonic() < deadline, f"not after {timeout_s:g} s:\n{self.output()}"
            time.sleep(POLL_S)

    def output(self) -> str:
        """Everything that it has printed."""
        return self.log.read_text(errors="replace")

    def find(self, title: str) -> Process:
        """Its only process whose title contains this."""
        found = [process for process in marked_processes(self.mark) if title in process.title]
        assert len(found) == 1, [process.title for process in marked_processes(self.mark)]
        return found[0]


def kill_marked(mark: str) -> None:
    """Send SIGKILL to every process with the mark."""
    for process in marked_processes(mark):
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def wait_until_gone(mark: str, grace_s: float, *, besides: tuple[str, ...] = ()) -> list[Process]:
    """The marked processes that are left after `grace_s`, without those titled `besides`."""
    deadline = time.monotonic() + grace_s
    while True:
        left = [process for process in marked_processes(mark) if process.title not in besides]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)


def checkpointed(run: Path, step: int) -> bool:
    """Whether the log says that the checkpoint of `step` or a later one is complete."""
    return any(record.step >= step for record in records(run, CheckpointRecord))


def records(run: Path, kind: type[Any] = object) -> list[Any]:
    """The records of one kind in a run, without superseded ones."""
    log: list[Record] = read_records(run / FILE_NAME)
    return [record for record in log if isinstance(record, kind)]


def drawn(run: Path) -> dict[int, tuple[Any, ...]]:
    """Mix, rollout ids by shelf and their digest of every step. Each must be logged once."""
    steps = records(run, StepRecord)
    assert len({record.step for record in steps}) == len(steps)
    return {record.step: (record.mix, record.rollout_ids, record.draw_digest) for record in steps}


def fresh_ordinals(run: Path) -> Iterator[int]:
    """The ordinals that the steps consumed, in the order of the steps."""
    for record in records(run, StepRecord):
        yield from (int(name.removeprefix("student-")) for name in record.rollout_ids["fresh"])
