"""Behaviour that all engines share: seeds, weight versions and limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillm_ray.config import RolloutConfig, SamplingConfig
from distillm_ray.models.directory import check_model_directory
from distillm_ray.rollout.generator import (
    Generator,
    GeneratorJob,
    MixedTeacher,
    Request,
    Response,
    SlowRequest,
    request_seed,
    student_job,
)
from distillm_ray.types import Demand, FinishReason, Source, Weights
from tests import make
from tests.integration.tiny import make_model

END = 99


PROMPT = make.prompt(token_ids=[1, 2, 3])


class EchoGenerator(Generator):
    """Responds with the prompt and the version of its weights, as soon as `allowed` is set."""

    async def start(self) -> None:
        self.allowed = asyncio.Event()
        self.allowed.set()
        self.weights = 0
        self.requests: list[Request] = []
        self.failure: Exception | None = None
        self.places = asyncio.Semaphore(100)  # requests that it decodes at the same time
        self.events: list[str] = []  # sleeps, wakes and loads
        self.hangs = False

    async def stop(self) -> None:
        pass

    async def _respond(self, request: Request) -> Response:
        self.requests.append(request)
        async with self.places:
            request.sign()
            await self.allowed.wait()
        tokens = [*request.prompt_ids.tolist(), 1000 + self.weights, END]
        return Response(
            token_ids=np.array(tokens, dtype=np.int32),
            logprobs=np.zeros(len(tokens), dtype=np.float32),
            finish_reason=FinishReason.STOP,
        )

    async def _load(self, buckets: Sequence[Any]) -> None:
        if self.failure is not None:
            raise self.failure
        self.events.append("load")
        (self.weights,) = buckets

    async def _sleep(self) -> None:
        self.events.append("sleep")

    async def _wake(self) -> None:
        self.events.append("wake")
        if self.hangs:
            await asyncio.sleep(60)


def job(end_token_ids: tuple[int, ...] = (END,)) -> GeneratorJob:
    return GeneratorJob(
        model=Path("model"),
        source=Source.STUDENT,
        sampling=SamplingConfig(),
        end_token_ids=end_token_ids,
        vocabulary_size=2000,
        max_prompt_tokens=4,
        max_response_tokens=8,
        seed=3,
        device="cpu",
    )


async def started(timeout_s: float = 5.0) -> EchoGenerator:
    generator = EchoGenerator(RolloutConfig(timeout_s=timeout_s, stall_timeout_s=timeout_s), job())
    await generator.start()
    return generator


def demand(ordinal: int = 0, min_version: int = 0) -> Demand:
    return make.demand(ordinal, of=PROMPT, min_version=min_version)


def weights(version: int) -> Weights[Any]:
    return make.weights(version, version)


# ---- seeds ---------------------------------------------------------------------------------------


def test_seeds_differ_by_run_ordinal_and_attempt_and_fit_into_63_bits() -> None:
    seeds = {
        request_seed(run, ordinal, attempt)
        for run in range(4)
        for ordinal in range(50)
        for attempt in range(3)
    }
    assert len(seeds) == 4 * 50 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, 2, 3) == request_seed(1, 2, 3)


# ---- versions and limits -------------------------------------------------------------------------


async def test_a_rollout_carries_its_ordinal_and_the_version_it_started_with() -> None:
    generator = await started()
    await generator.update_weights(weights(4), keep_in_flight=True)
    made = await generator.generate(demand(ordinal=7))
    assert (made.rollout_id, made.ordinal, made.version) == ("student-7", 7, 4)
    assert made.response_ids.tolist() == [1, 2, 3, 1004, END]
    assert made.loss_mask.all()
    assert generator.requests[0].seed == request_seed(3, 7, 0)


def test_the_students_job_sleeps_where_it_shares_its_device(tmp_path: Path) -> None:
    make_model(tmp_path / "student", seed=0)
    facts = check_model_directory(tmp_path / "student", "student", trust_remote_code=False)
    for placement, sleeps in (("separate", False), ("colocated", True)):
        config = make.config(run={"placement": placement})
        assert student_job(config, facts, end_token_id=3, device="cuda").sleeps is sleeps


def test_the_students_job_names_the_teacher_where_trained_responses_are_mixed(
    tmp_path: Path,
) -> None:
    make_model(tmp_path, seed=0)
    facts = check_model_directory(tmp_path, "student")

    def teacher(mix: float, **sections: Any) -> MixedTeacher | None:
        config = make.config(
            rollout={"engine": {"type": "transformers"}, "teacher_mix": mix},
            teacher={"model": "/models/teacher", "dtype": "bfloat16", "trust_remote_code": True},
            **sections,
        )
        return student_job(config, facts, end_token_id=3, device="cpu").teacher

    assert teacher(0.0) is None
    assert teacher(0.2) == MixedTeacher(
        model=Path("/models/teacher"), share=0.2, dtype="bfloat16", trust_remote_code=True
    )
    assert teacher(0.2, schedule={"type": "fixed", "phi": 0.0}) is None, "only evaluations"


async def test_the_teacher_takes_part_in_the_demand_and_in_nothing_else() -> None:
    teacher = MixedTeacher(model=Path("t"), share=0.2, dtype="auto", trust_remote_code=False)
    generator = EchoGenerator(RolloutConfig(), replace(job(), teacher=teacher))
    await generator.start()
    await generator.generate(demand())
    await generator.complete(PROMPT, SamplingConfig(max_tokens=2), seed=0)
    assert [request.teacher_mix for request in generator.requests] == [0.2, 0.0]


async def test_a_request_waits_for_its_minimum_version() -> None:
    generator = await started()
    waiting = asyncio.create_task(generator.generate(demand(min_version=2)))
    await generator.update_weights(weights(1), keep_in_flight=True)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await generator.update_weights(weights(2), keep_in_flight=True)
    assert (await waiting).version == 2


async def test_without_keep_in_flight_an_update_drains_and_new_requests_wait_for_it() -> None:
    generator = await started()
    generator.allowed.clear()
    running = asyncio.create_task(generator.generate(demand(0)))
    await asyncio.sleep(0.01)
    update = asyncio.create_task(generator.update_weights(weights(1), keep_in_flight=False))
    await asyncio.sleep(0.01)
    late = asyncio.create_task(generator.generate(demand(1)))
    await asyncio.sleep(0.01)
    assert generator.weights == 0
    assert len(generator.requests) == 1
    generator.allowed.set()
    assert (await running).response_ids.tolist()[-2] == 1000
    await update
    assert (await late).response_ids.tolist()[-2] == 1001


async def test_with_keep_in_flight_an_update_does_not_wait() -> None:
    generator = await started()
    generator.allowed.clear()
    running = asyncio.create_task(generator.generate(demand(0)))
    await asyncio.sleep(0.01)
    await generator.update_weights(weights(1), keep_in_flight=True)
    assert generator.version == 1
    generator.allowed.set()
    assert (await running).version == 0


async def test_a_timeout_while_waiting_for_weights_names_both_versions() -> None:
    generator = await started(timeout_s=0.05)
    with pytest.raises(TimeoutError, match="weights of version 9; the generator has version 0"):
        await generator.generate(demand(min_version=9))


async def test_a_slow_response_is_aborted_by_name_and_its_engine_works_on() -> None:
    generator = await started(timeout_s=0.05)
    generator.allowed.clear()
    with pytest.raises(SlowRequest, match=r"student-5 was aborted: .* longer than 0\.05 s"):
        await generator.generate(demand(ordinal=5))
    # The request has left the engine, so an update that drains the engine does not wait.
    await generator.update_weights(weights(1), keep_in_flight=False)
    generator.allowed.set()
    assert (await generator.generate(demand())).version == 1


async def test_the_limit_of_a_response_counts_from_its_turn_in_the_engine() -> None:
    generator = await started(timeout_s=0.4)
    generator.places = asyncio.Semaphore(1)
    generator.allowed.clear()

    async def let_go() -> None:
        while True:  # a response every 0.1 s, so the eighth waits twice the limit for its turn
            await asyncio.sleep(0.1)
            generator.allowed.set()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            generator.allowed.clear()

    pace = asyncio.create_task(let_go())
    began = time.monotonic()
    made = await asyncio.gather(*(generator.generate(demand(number)) for number in range(8)))
    assert time.monotonic() - began > 0.4
    assert [one.ordinal for one in made] == list(range(8))
    pace.cancel()


async def test_requests_that_drain_an_engine_in_many_waves_do_not_break_the_update() -> None:
    generator = await started(timeout_s=0.3)
    generator.places = asyncio.Semaphore(1)
    generator.allowed.clear()
    running = [asyncio.create_task(generator.generate(demand(number))) for number in range(5)]
    await asyncio.sleep(0.01)
    update = asyncio.create_task(generator.update_weights(weights(1), keep_in_flight=False))
    late = asyncio.create_task(generator.generate(demand(9, min_version=1)))
    for _ in running:  # each is decoded for 0.15 s: 0.75 s in all
        await asyncio.sleep(0.15)
        generator.allowed.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        generator.allowed.clear()
    generator.allowed.set()
    assert [one.version for one in await asyncio.gather(*running)] == [0] * 5
    await update
    assert (await late).version == 1


async def test_an_engine_is_silent_only_while_it_owes_tokens() -> None:
    generator = await started()
    assert generator.silent_s == 0.0
    generator.allowed.clear()
    running = asyncio.create_task(generator.generate(demand()))
    waiting = asyncio.create_task(generator.generate(demand(1, min_version=9)))
    await asyncio.sleep(0.05)
    assert 0.04 < generator.silent_s < 4.0
    generator.requests[0].sign()
    assert generator.silent_s < 0.04
    generator.allowed.set()
    await running
    assert generator.silent_s == 0.0, "the other one waits for weights, which no engine owes"
    waiting.cancel()


def test_the_default_limit_of_a_response_follows_from_its_tokens() -> None:
    pool = RolloutConfig()
    assert pool.response_limit_s(256) == 600.0
    assert pool.response_limit_s(32_768) == 16_384.0
    assert RolloutConfig(timeout_s=7.0).response_limit_s(32_768) == 7.0


def test_the_limit_of_many_responses_follows_from_their_waves() -> None:
    pool = RolloutConfig(timeout_s=10.0, stall_timeout_s=3.0, actors=2)
    assert pool.limit_s(128, 256) == (1 + 1) * 10.0 + 3.0
    assert pool.limit_s(129, 256) == (2 + 1) * 10.0 + 3.0


async def test_an_engine_sleeps_when_its_requests_have_ended_and_what_comes_then_waits() -> None:
    generator = await started()
    generator.allowed.clear()
    first = asyncio.create_task(generator.generate(demand(0)))
    await asyncio.sleep(0.01)
    sleeping = asyncio.create_task(generator.sleep())
    await asyncio.sleep(0.01)
    assert generator.events == [], "a request is in flight"
    generator.allowed.set()
    await sleeping
    assert (first.done(), generator.events) == (True, ["sleep"])
    second = asyncio.create_task(generator.generate(demand(1, min_version=4)))
    update = asyncio.create_task(generator.update_weights(weights(4), keep_in_flight=True))
    await asyncio.sleep(0.02)
    assert (len(generator.requests), generator.events) == (1, ["sleep"])
    assert generator.silent_s == 0.0, "an engine that sleeps owes no token"
    await generator.wake()
    assert (await second).version == 4
    await update
    assert generator.events == ["sleep", "wake", "load"]


async def test_an_engine_that_does_not_wake_in_time_is_named() -> None:
    generator = await started(timeout_s=0.05)
    await generator.sleep()
    generator.hangs = True
    with pytest.raises(TimeoutError, match=r"did not wake within rollout\.stall_timeout_s = 0\.05"):
        await generator.wake()


async def test_after_a_failed_update_every_request_is_refused() -> None:
    generator = await started()
    generator.failure = OSError("no space left")
    with pytest.raises(OSError, match="no space left"):
        await generator.update_weights(weights(1), keep_in_flight=True)
    with pytest.raises(RuntimeError, match="must be replaced"):
        await generator.generate(demand())


async def test_complete_derives_the_seed_from_seed_and_prompt_in_any_order() -> None:
    generator = await started()
    other = make.prompt("q", token_ids=PROMPT.token_ids)
    for asked in (PROMPT, other, PROMPT):
        await generator.complete(asked, SamplingConfig(max_tokens=2), seed=5)
    first, second, third = (request.seed for request in generator.requests)
    assert first == third
    assert first != second


async def test_a_request_that_is_too_long_is_refused_before_the_engine_sees_it() -> None:
    generator = await started()
    with pytest.raises(ValueError, match=r"got 3 \+ 20 > 12"):
        await generator.complete(PROMPT, SamplingConfig(max_tokens=20), seed=0)
    assert generator.requests == []


def test_a_model_without_any_end_token_is_refused() -> None:
    with pytest.raises(ValueError, match="every response would run to its length limit"):
        EchoGenerator(RolloutConfig(), job(end_token_ids=()))
