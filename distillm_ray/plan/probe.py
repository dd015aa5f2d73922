"""Measures the stage times on the machine at hand, with the engines that a run uses.

Every role works in a process of its own, as in a run, and one after the other. On a CPU a process
with one thread is measured in CPU-seconds, which other work on the machine changes little.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import IO

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from distillm_ray.batching import pack, plan_step, plan_validation
from distillm_ray.config import Config
from distillm_ray.loss.terms import loss_at
from distillm_ray.models.dtypes import resolve_dtype
from distillm_ray.plan.stages import (
    GenerationTimes,
    LearningTimes,
    ScoringTimes,
    Stages,
    non_negative_fit,
)
from distillm_ray.preflight import Preflight
from distillm_ray.remote.inputs import fetched
from distillm_ray.rollout.engines import make_generator
from distillm_ray.rollout.generator import GeneratorJob, student_job
from distillm_ray.teacher.scorer import Scorer
from distillm_ray.types import (
    Bucket,
    Demand,
    Device,
    Draw,
    DrawnSequence,
    LearnerBatch,
    Mix,
    Prompt,
    Rollout,
    Shelf,
    Source,
    TeacherTargets,
    Weights,
)
from distillm_ray.weights.gather import gather

MAX_REQUESTS = 32  # that the probe's engine has in flight
SHORT_TOKENS = 24  # of the responses that time the engine with few requests
REPETITIONS = 2  # of each measured step; the shorter one counts
TOGETHER_S = 4.0  # how long the cores are kept busy to see what that costs a learner
_SHOWN_BYTES = 4000  # of a role's output, if it fails

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ProbeData:
    """Sequences of the training data."""

    prompts: Sequence[Prompt]
    demonstrations: Sequence[Rollout]
    end_token_id: int


def measure(
    config: Config, preflight: Preflight, data: ProbeData, device: Device, say: Say
) -> Stages:
    """Measure every stage that a run of `config` has.

    Args:
        say: is told what is measured next.

    Raises:
        UserError: a model cannot be loaded.
    """
    generation = scoring = None
    targets: dict[str, TeacherTargets] | None = None
    contention = 1.0
    cores = len(os.sched_getaffinity(0))
    responses: Sequence[Rollout] = ()
    if config.wants_rollouts:
        say("generator: loading the student, generating")
        job = student_job(config, preflight.student, end_token_id=data.end_token_id, device=device)
        with _process() as process:
            generation, responses = process.submit(
                _measure_generator, config, job, data.prompts[:MAX_REQUESTS]
            ).result()
    sequences = list(data.demonstrations) if config.draws_data else list(responses)
    rows = _rows(sequences, config.learner.max_micro_batch_tokens)
    needed = {one.rollout_id: one for row in rows for one in row}
    vocabulary_size = preflight.vocabulary_size
    with _process() as teacher, _process() as student:
        if config.teacher is not None and config.loss.needs_teacher:
            say("scorer: loading the teacher, scoring")
            scoring, targets = teacher.submit(
                _measure_scorer, config, vocabulary_size, device, sequences, list(needed.values())
            ).result()
        say("learner: loading the student, training")
        learning = student.submit(
            _measure_learner, config, vocabulary_size, device, rows, targets
        ).result()
        others = cores - config.learner.num_threads
        if device == "cpu" and scoring is not None and others > 0:
            say("learner and scorer at the same time")
            burning = teacher.submit(_keep_busy, list(needed.values()), others, TOGETHER_S)
            contention = student.submit(_slowdown, TOGETHER_S).result()
            burning.result()
    return Stages(
        device=device,
        cores=cores,
        learning=learning,
        generation=generation,
        scoring=scoring,
        contention=contention,
    )


@contextmanager
def _process() -> Iterator[ProcessPoolExecutor]:
    """A process of a role. What it prints is kept off the screen, and shown if it fails."""
    with tempfile.NamedTemporaryFile("r", errors="replace") as output:
        executor = ProcessPoolExecutor(
            max_workers=1,
            mp_context=get_context("spawn"),
            initializer=_redirect,
            initargs=(output.name,),
        )
        try:
            with executor:
                yield executor
        except Exception:
            _show_end(output)
            raise


def _redirect(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def _show_end(output: IO[str]) -> None:
    output.seek(max(0, output.seek(0, os.SEEK_END) - _SHOWN_BYTES))
    os.write(2, output.read().encode())


def _clock(device: Device, num_threads: int) -> Callable[[], float]:
    """Wall-clock where several threads or a GPU work, else the process's own seconds."""
    return _cpu_seconds if device == "cpu" and num_threads == 1 else time.perf_counter


def _cpu_seconds() -> float:
    """Of this process and its living children: vLLM's engine is one."""
    own = time.process_time()
    return own + sum(_cpu_seconds_of(child) for child in _children(os.getpid()))


def _cpu_seconds_of(process: int) -> float:
    """Of a process and all below it; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    ticks = int(fields[11]) + int(fields[12])  # utime and stime, behind the name and its bracket
    below = sum(_cpu_seconds_of(child) for child in _children(process))
    return ticks / os.sysconf("SC_CLK_TCK") + below


def _children(process: int) -> list[int]:
    threads: list[Path] = []
    with suppress(FileNotFoundError):  # it has ended
        threads += Path(f"/proc/{process}/task").iterdir()
    found: list[int] = []
    for one in threads:
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended
            found += map(int, (one / "children").read_text().split())
    return found


def _shortest(clock: Callable[[], float], run: Callable[[], object], device: Device) -> float:
    """Of some repetitions: what disturbs a measurement only makes it longer."""
    seconds: list[float] = []
    for _ in range(REPETITIONS):
        started = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return min(seconds)


# ---- the generator -------------------------------------------------------------------------------


def _measure_generator(
    config: Config, job: GeneratorJob, prompts: Sequence[Prompt]
) -> tuple[GenerationTimes, list[Rollout]]:
    """Generate with few and many requests in flight; also returns what the student responds."""
    clock = _clock(job.device, config.rollout.num_threads)
    short = replace(job, sampling=job.sampling.model_copy(update={"max_tokens": _short(job)}))
    single = replace(job, sampling=job.sampling.model_copy(update={"max_tokens": 1}))

    async def run() -> tuple[GenerationTimes, list[Rollout]]:
        generator = make_generator(config.rollout, job)
        await generator.start()
        features: list[tuple[float, float, float]] = []
        seconds: list[float] = []

        async def respond(
            asked: GeneratorJob, some: Sequence[Prompt], serial: int
        ) -> list[Rollout]:
            """Every call has ordinals of its own, and so its own sampling noise."""
            generator.job = asked
            started = clock()
            responses = await asyncio.gather(
                *(
                    generator.generate(_demand(prompt, 1000 * serial + index))
                    for index, prompt in enumerate(some)
                )
            )
            lengths = [len(one.response_ids) for one in responses]
            seconds.append(clock() - started)
            features.append((max(lengths), sum(lengths), sum(len(p.token_ids) for p in some)))
            return responses

        await respond(short, prompts[:2], 0)
        features.clear()
        seconds.clear()
        few = prompts[: max(1, len(prompts) // 4)]
        # The prefix cache keeps prompts of the same weights: each is read only once.
        versions = iter(range(1, 100))
        buckets = _buckets(config, job.device)

        async def load() -> float:
            weights = Weights(version=next(versions), buckets=buckets, nbytes=0)
            started = clock()
            await generator.update_weights(weights, keep_in_flight=True)
            return clock() - started

        await load()
        await respond(single, prompts, 1)
        loads = [await load()]
        await respond(short, prompts[:1], 2)
        loads.append(await load())
        await respond(short, few, 3)
        loads.append(await load())
        await respond(short, prompts, 4)
        loads.append(await load())
        responses = await respond(job, prompts, 5)
        await generator.stop()
        engine_step, token, prompt_token = non_negative_fit(features, seconds)
        lengths = tuple(len(one.response_ids) for one in responses)
        times = GenerationTimes(
            engine_step=engine_step,
            token=token,
            prompt_token=prompt_token,
            load=statistics.median(loads),
            response_tokens=lengths,
        )
        return times, responses

    return asyncio.run(run())


def _short(job: GeneratorJob) -> int:
    return min(SHORT_TOKENS, job.sampling.max_tokens or job.max_response_tokens)


def _demand(prompt: Prompt, ordinal: int) -> Demand:
    return Demand(
        ordinal=ordinal,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        min_version=0,
    )


def _buckets(config: Config, device: Device) -> tuple[Bucket, ...]:
    """The student's weights as the learners publish them."""
    model = AutoModelForCausalLM.from_pretrained(
        fetched(config.student.model),
        local_files_only=True,
        trust_remote_code=config.student.trust_remote_code,
    )
    return tuple(gather(model, resolve_dtype(config.rollout.dtype, device), keep=True))


# ---- the scorer ----------------------------------------------------------------------------------

_scorer: Scorer | None = None  # of the process that measures it
_scorer_loop: asyncio.Runner | None = None


def _measure_scorer(
    config: Config,
    vocabulary_size: int,
    device: Device,
    sequences: Sequence[Rollout],
    needed: Sequence[Rollout],
) -> tuple[ScoringTimes, dict[str, TeacherTargets]]:
    """Passes over one, some and many sequences; also returns the targets of `needed`."""
    global _scorer, _scorer_loop
    assert config.teacher is not None
    _scorer_loop = asyncio.Runner()
    _scorer = Scorer(config.teacher, config.targets, vocabulary_size=vocabulary_size, device=device)
    _scorer_loop.run(_scorer.start())
    clock = _clock(device, config.teacher.num_threads)
    most = _fitting(sequences, config.teacher.max_batch_tokens)
    _score(sequences[:most])  # warms up
    features: list[tuple[float, float]] = []
    seconds: list[float] = []
    for count in sorted({1, max(1, most // 4), most}):
        batch = sequences[:count]
        seconds.append(_shortest(clock, partial(_score, batch), device))
        features.append((1.0, sum(one.num_tokens for one in batch)))
    batch_seconds, token = non_negative_fit(features, seconds)
    return ScoringTimes(batch=batch_seconds, token=token), _score(needed)


def _score(rollouts: Sequence[Rollout]) -> dict[str, TeacherTargets]:
    assert _scorer is not None and _scorer_loop is not None
    scorer = _scorer

    async def score() -> dict[str, TeacherTargets]:
        scored = await asyncio.gather(*(scorer.score(one) for one in rollouts))
        return {
            rollout.rollout_id: targets
            for rollout, (_, targets) in zip(rollouts, scored, strict=True)
        }

    return _scorer_loop.run(score())


def _keep_busy(rollouts: Sequence[Rollout], num_threads: int, seconds: float) -> None:
    """Score for at least so long, on so many threads."""
    torch.set_num_threads(num_threads)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        _score(rollouts)


def _fitting(sequences: Sequence[Rollout], max_tokens: int) -> int:
    """How many of the first sequences fit into so many tokens; at least one."""
    total = np.cumsum([one.num_tokens for one in sequences])
    return max(1, int(np.searchsorted(total, max_tokens, side="right")))


# ---- the learner ---------------------------------------------------------------------------------

_alone: tuple[Callable[[], float], Callable[[], object], float] | None = None
"""Of the process that measures the learner: its clock, a step, and the seconds that it took."""


def _rows(sequences: Sequence[Rollout], max_tokens: int) -> list[list[Rollout]]:
    """Packed rows of different kinds: one sequence, long prompts, long responses, as they come."""
    by_response = sorted(sequences, key=lambda one: one.num_loss_tokens / one.num_tokens)
    full = [
        list(order[: _fitting(order, max_tokens)])
        for order in (by_response, by_response[::-1], list(sequences))
    ]
    shortest = min(sequences, key=lambda one: one.num_tokens)
    return [[shortest], *full]


def _measure_learner(
    config: Config,
    vocabulary_size: int,
    device: Device,
    rows: Sequence[Sequence[Rollout]],
    targets: dict[str, TeacherTargets] | None,
) -> LearningTimes:
    """Steps over rows of different kinds and numbers."""
    global _alone
    # Imported in the learner's process: DeepSpeed takes seconds, and other roles do without.
    from distillm_ray.learner.learner import Learner  # noqa: PLC0415
    from distillm_ray.learner.teacher_head import teacher_head  # noqa: PLC0415

    on = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    on_device = config.learner
    if device == "cpu":  # a config for a cluster with GPUs: here there is nothing to move
        on_device = on_device.model_copy(update={"offload": "none", "offload_directory": None})
    learner = Learner(
        on_device,
        config.student,
        config.loss,
        teacher_head=teacher_head(config, vocabulary_size=vocabulary_size, device=on),
        vocabulary_size=vocabulary_size,
        device=on,
        seed=config.run.seed,
        compare_engine=not config.mixes_teacher,
    )
    clock = _clock(device, config.learner.num_threads)
    single, prompts, responses, mixed = (_batch(config, row, targets) for row in rows)
    learner.train_step([mixed], 0)  # warms up
    features: list[tuple[float, float, float, float]] = []
    seconds: list[float] = []
    for batches in (
        [single],
        [single, single],
        [prompts],
        [responses],
        [prompts, responses, mixed],
    ):
        seconds.append(_shortest(clock, partial(learner.train_step, batches, 0), device))
        features.append(
            (
                1.0,
                len(batches),
                sum(len(one.token_ids_L) for one in batches),
                sum(len(one.labels_N) for one in batches),
            )
        )
    step_seconds, row, token, loss_token = non_negative_fit(features, seconds)
    _alone = clock, partial(learner.train_step, [responses], 0), seconds[3]
    (held_out,) = plan_validation(
        rows[-1], num_ranks=1, max_micro_batch_tokens=config.learner.max_micro_batch_tokens
    )
    held_out_batches = [pack(one, None) for one in held_out]
    validation = _shortest(clock, lambda: learner.validation_loss(held_out_batches), device)
    dtype = resolve_dtype(config.rollout.dtype, on)

    def publish() -> None:
        for bucket in learner.gather_weights(dtype):
            for _, _, values in bucket.values():
                values.copy()  # into the object store

    with tempfile.TemporaryDirectory() as folder:
        started = clock()
        learner.save(Path(folder))
        checkpoint = clock() - started
    return LearningTimes(
        step=step_seconds,
        row=row,
        token=token,
        loss_token=loss_token,
        validation_token=validation / sum(len(one.token_ids_L) for one in held_out_batches),
        gather=_shortest(clock, publish, device),
        checkpoint=checkpoint,
    )


def _batch(
    config: Config, rollouts: Sequence[Rollout], targets: dict[str, TeacherTargets] | None
) -> LearnerBatch:
    """One row, as a step of the run would have it."""
    student = rollouts[0].source is Source.STUDENT
    shelf = Shelf.FRESH if student else Shelf.DATASET
    plan = plan_step(
        Draw(
            step=0,
            phi=float(student),
            psi=float(student),
            mix=Mix(fresh=len(rollouts)) if student else Mix(dataset=len(rollouts)),
            sequences=tuple(DrawnSequence(rollout=one, shelf=shelf, age=0) for one in rollouts),
        ),
        num_ranks=1,
        max_micro_batch_tokens=config.learner.max_micro_batch_tokens,
        loss=loss_at(config.loss, 0, num_steps=config.learner.num_steps),
    )
    ((micro_batch,),) = plan.ranks
    return pack(micro_batch, targets)


def _slowdown(seconds: float) -> float:
    """How much longer a step takes now than it took alone; measured for so long."""
    assert _alone is not None
    clock, step, alone = _alone
    together: list[float] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = clock()
        step()
        together.append(clock() - started)
    return max(1.0, statistics.median(together) / alone)
