"""What a large data set costs the driver: seconds and memory of each stage from file to buffer.

    python bench/data_scale.py [--rows 100000] [--in-process]

Synthetic rows of about 100 tokens for the prompt and 100 for the response, in the words of the
quickstart's data, with its tokenizer and template. The stages are those of `distillm-ray train`
between its start and its first step, in a process of its own, beside Ray with two CPUs.

Memory is of the driver's process: what it holds of its own after a stage, and the most that was
resident during it, pages of the object store included.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import ray
from _common import REPOSITORY, write
from rich.console import Console
from rich.table import Table

from distillm_ray.cluster.actors import kill
from distillm_ray.config import Config
from distillm_ray.data import ray_data, tokenizing
from distillm_ray.data.fingerprint import keep_or_compare
from distillm_ray.data.splits import Splits, splits_of
from distillm_ray.models.tokenizers import load_tokenizer
from distillm_ray.remote.inputs import fetched
from distillm_ray.replay.build import build_buffer
from distillm_ray.report.opening import opening_lines
from distillm_ray.report.rows import write_first_rows
from distillm_ray.teacher.target_sizes import target_sizes
from distillm_ray.types import TrainingData

MODEL = REPOSITORY / "models" / "smollm2-135m-instruct"
WORDS = 75  # of a prompt and of a response: about 100 tokens with the template's
MIB = 2**20
CPUS = 2
STORE_BYTES = 3 * 2**30


def write_rows(path: Path, num_rows: int) -> None:
    """Rows whose words are drawn from the quickstart's."""
    text = (REPOSITORY / "data" / "quickstart" / "train.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    words = np.array(" ".join(f"{one['prompt']} {one['response']}" for one in found).split())
    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            chosen = words[rng.integers(len(words), size=2 * WORDS)]
            prompt, response = " ".join(chosen[:WORDS]), " ".join(chosen[WORDS:])
            file.write(json.dumps({"prompt": prompt, "response": response}) + "\n")


def config_of(rows: Path, directory: Path) -> Config:
    """A run on these rows, of which some are held out."""
    return Config.model_validate(
        {
            "run": {"directory": str(directory)},
            "teacher": {"model": str(MODEL)},
            "student": {"model": str(MODEL)},
            "data": {"train": [str(rows)]},
            "learner": {"steps": 1000, "batch_size": 64},
        }
    )


# ---- memory --------------------------------------------------------------------------------------


def resident() -> dict[str, int]:
    """Bytes of this process: its own, those of shared memory, and the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    names = {"own": "RssAnon", "shared": "RssShmem", "peak": "VmHWM"}
    return {name: int(values[key].split()[0]) * 1024 for name, key in names.items()}  # from kB


@dataclass(frozen=True)
class Stage:
    """What one stage cost."""

    name: str
    seconds: float
    own: int  # bytes, after it
    shared: int
    peak: int  # bytes, during it


@contextmanager
def measured(name: str, stages: list[Stage]) -> Iterator[None]:
    """Append a stage."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    gc.collect()
    stages.append(Stage(name, seconds, **resident()))


# ---- the buffer's process ------------------------------------------------------------------------


class BufferHost:
    """Builds the buffer of a run as its actor does."""

    def build(self, config: Config, data: TrainingData) -> tuple[float, dict[str, int]]:
        """Seconds, and memory afterwards."""
        started = time.perf_counter()
        self._buffer = build_buffer(config, data)
        return time.perf_counter() - started, resident()


# ---- the stages ----------------------------------------------------------------------------------


def run(config: Config, *, in_process: bool) -> tuple[Splits, list[Stage], dict[str, Any]]:
    """The driver's way from the file to the buffer."""
    stages: list[Stage] = []
    with measured("imports, tokenizer", stages):
        tokenizer = load_tokenizer(fetched(config.student.model))
    with measured("read, tokenize, collect", stages):
        splits = splits_of(
            config,
            tokenizer,
            vocabulary_size=len(tokenizer),
            map_files=(
                tokenizing.map_files
                if in_process
                else ray_data.mapper(stall_timeout_s=config.run.startup_timeout_s)
            ),
        )
    with measured("opening lines", stages):
        opening_lines(config, splits, tokenizer)
    with measured("sizes of the targets", stages):
        target_sizes(config, splits.train.demonstrations, (), 1152)
    with measured("digests of the rows", stages):
        keep_or_compare(config.run.local_directory, splits, resumed=False)
    with measured("first rows", stages):
        write_first_rows(
            config.run.local_directory, splits, tokenizer, (splits.train.end_token_id,)
        )
    if in_process:
        return splits, stages, {}
    with measured("share with the buffer", stages):
        data = ray.put(splits.to_draw_from())
    host = ray.remote(num_cpus=0)(BufferHost).remote()
    started = time.perf_counter()
    seconds, memory = ray.get(host.build.remote(config, data))
    total = time.perf_counter() - started
    kill(host, no_restart=True)
    return splits, stages, {"build_s": seconds, "restore_s": total, **memory}


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds and memory of the driver's read path.")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--in-process", action="store_true", help="without Ray, as run.mode=local")
    arguments = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    with TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(rows, arguments.rows)
        if not arguments.in_process:
            ray.init(
                num_cpus=CPUS,
                object_store_memory=STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
            )
        config = config_of(rows, Path(folder))
        splits, stages, buffer = run(config, in_process=arguments.in_process)
        tokens = itertools.chain(
            (len(one.token_ids) for one in splits.train.prompts),
            (len(one.response_ids) for one in splits.train.demonstrations),
        )
        mean_tokens = sum(tokens) / len(splits.train.prompts)
    table = Table("stage", "s", "own, MiB", "store, MiB", "peak, MiB", title=f"{arguments.rows:,}")
    for one in stages:
        sizes = (one.own, one.shared, one.peak)
        table.add_row(one.name, f"{one.seconds:.1f}", *(f"{size / MIB:,.0f}" for size in sizes))
    if buffer:
        sizes = (buffer["own"], buffer["shared"], buffer["peak"])
        seconds = f"{buffer['restore_s']:.1f}"
        table.add_row("the buffer's process", seconds, *(f"{size / MIB:,.0f}" for size in sizes))
    console = Console()
    console.print(table)
    held = stages[1].own - stages[0].own
    total = sum(one.seconds for one in stages[1:])
    console.print(
        f"{total:.1f} s; the driver holds {held / arguments.rows:,.0f} bytes a row of"
        f" {mean_tokens:.0f} tokens; at most {max(one.peak for one in stages) / MIB:,.0f} MiB"
    )
    write(
        "data_scale",
        {
            "rows": arguments.rows,
            "in_process": arguments.in_process,
            "tokens_per_row": mean_tokens,
            "bytes_per_row": held / arguments.rows,
            "stages": [vars(one) for one in stages],
            "buffer": buffer,
        },
    )


if __name__ == "__main__":
    main()
