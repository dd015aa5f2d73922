"""vLLM's processes end with the generator that started them, whenever and however it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import make
from tests.integration.tiny import (
    LIMIT_S,
    MARK,
    POLL_S,
    clean_environment,
    kill_marked,
    marked_processes,
    wait_until_gone,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(2 * LIMIT_S)]

GENERATOR = """
import asyncio, sys
from pathlib import Path
from distillm_ray.config import RolloutConfig, SamplingConfig, VllmEngine
from distillm_ray.rollout.generator import GeneratorJob
from distillm_ray.rollout.vllm_engine import VllmGenerator
from distillm_ray.types import Source

async def main(model, tensor_parallel):
    job = GeneratorJob(
        model=Path(model), source=Source.STUDENT, sampling=SamplingConfig(), end_token_ids=(5,),
        vocabulary_size=64, max_prompt_tokens=32, max_response_tokens=32, seed=7, device="cpu",
    )
    pool = RolloutConfig(
        engine=VllmEngine(max_num_seqs=4), dtype="float32", num_threads=1,
        tensor_parallel=tensor_parallel,
    )
    await VllmGenerator(pool, job).start()
    print("STARTED", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make.llama(
        hidden_size=64,  # vLLM's CPU attention wants heads of 32
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=5,
    ).save_pretrained(directory)
    return directory


class Owner:
    """A generator in a process of its own."""

    def __init__(self, model: Path, tensor_parallel: int, log: Path) -> None:
        self.mark = uuid.uuid4().hex
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-c", GENERATOR, str(model), str(tensor_parallel)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**clean_environment(), MARK: self.mark},
            )

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(POLL_S)

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def started(self) -> bool:
        return "STARTED" in self.output()

    def pids(self, title: str) -> list[int]:
        return [one.pid for one in marked_processes(self.mark) if title in one.title]

    def shared_memory(self) -> set[Path]:
        """What its processes share and a kill could leave behind."""
        lines = [
            line
            for one in marked_processes(self.mark)
            for line in Path(f"/proc/{one.pid}/maps").read_text().splitlines()
        ]
        return {Path(line[line.index("/") :]) for line in lines if "/dev/shm/" in line}


@contextmanager
def owner(model: Path, tensor_parallel: int, log: Path) -> Iterator[Owner]:
    made = Owner(model, tensor_parallel, log)
    try:
        yield made
    finally:
        kill_marked(made.mark)
        made.process.wait()


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_no_process_and_no_memory_is_left_of_an_engine_whose_generator_is_killed(
    model: Path, tensor_parallel: int, tmp_path: Path
) -> None:
    """Also where the core above the workers is frozen."""
    with owner(model, tensor_parallel, tmp_path / "log") as generator:
        generator.wait_for(generator.started)
        (core,) = generator.pids("EngineCore")
        assert len(generator.pids("Worker_TP")) == (tensor_parallel if tensor_parallel > 1 else 0)
        shared = generator.shared_memory()
        if tensor_parallel > 1:
            os.kill(core, signal.SIGSTOP)
        generator.process.kill()
        generator.process.wait()
        assert wait_until_gone(generator.mark, 30) == []
        assert {path for path in shared if path.exists()} == set()


def test_no_process_is_left_of_an_engine_whose_generator_is_killed_while_it_starts(
    model: Path, tmp_path: Path
) -> None:
    with owner(model, 2, tmp_path / "log") as generator:
        generator.wait_for(lambda: bool(generator.pids("EngineCore")))
        generator.process.kill()
        generator.process.wait()
        assert wait_until_gone(generator.mark, LIMIT_S) == []
