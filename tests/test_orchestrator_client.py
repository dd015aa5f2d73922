"""The limits of a learner's calls to the orchestrator."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from distillm_ray.cluster import actors, buffer, orchestrator
from distillm_ray.cluster.actors import CALL_TIMEOUT_S
from distillm_ray.cluster.buffer import ReplayProducer
from distillm_ray.cluster.log import AsyncLog
from distillm_ray.cluster.orchestrator import OrchestratorClient
from distillm_ray.cluster.rollout import GeneratorActor
from distillm_ray.config import GeneratorPoolConfig, SamplingConfig, TransformersEngine
from distillm_ray.errors import ClusterError
from distillm_ray.rollout.generator import GeneratorJob
from distillm_ray.types import Source
from tests import make


def test_a_publish_and_a_probe_may_take_as_long_as_the_pool_needs_to_replace_a_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make.config(
        run={"startup_timeout_s": 30.0},
        rollout={
            "timeout_s": 70.0,
            "stall_timeout_s": 20.0,
            "max_in_flight": 256,
            "engine": {"type": "vllm", "max_num_seqs": 64},
        },
    )
    waited: list[float] = []

    def ask(call: object, what: str, *, timeout_s: float) -> list[Any]:
        waited.append(timeout_s)
        return []

    monkeypatch.setattr(orchestrator, "ask", ask)
    remote = SimpleNamespace(remote=lambda *_: None)
    client = OrchestratorClient(cast(Any, SimpleNamespace(publish=remote)), config)
    client.publish(cast(Any, None))
    client._probe = cast(Any, object())
    client.finish_probe()
    assert len(waited) == 2
    # Four waves in the engine and one repeated, a stall, the weights, and the start of another one.
    assert min(waited) > 5 * 70.0 + 20.0 + 20.0 + 30.0


def test_the_other_ranks_wait_longer_for_rank_0_than_rank_0_for_anything() -> None:
    for sections in (
        {},
        {"learner": {"data_timeout_s": 9000.0}},
        {"rollout": {"timeout_s": 5000.0, "sampling": {"max_tokens": 64}}},
        {"run": {"startup_timeout_s": 7000.0}},
    ):
        config = make.config(**cast(Any, sections))
        inner = (
            orchestrator.restore_limit_s(config) + orchestrator.publish_limit_s(config),
            orchestrator.publish_limit_s(config) + orchestrator.probe_limit_s(config, 500),
            config.learner.data_timeout_s,
        )
        assert max(inner) + CALL_TIMEOUT_S < orchestrator.collective_limit_s(config, 500)


def test_a_wait_for_a_probe_is_longer_than_all_waves_before_it() -> None:
    config = make.config(rollout={"timeout_s": 10.0, "lookahead": 2})
    few = orchestrator.probe_limit_s(config, 4)
    waves = 640 // config.rollout.batch_size
    assert orchestrator.probe_limit_s(config, 4 + 640) == few + waves * 10.0


async def test_a_call_that_is_not_answered_ends_with_who_was_asked() -> None:
    with pytest.raises(ClusterError, match=r"^no reply within 0\.01 s: the log; "):
        await actors.reply(asyncio.sleep(60), "the log", timeout_s=0.01)


class SilentBuffer:
    """A handle of an actor that replies to nothing."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *_: asyncio.sleep(60))


async def test_every_call_of_the_orchestrator_to_the_buffer_has_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffer, "_WORK_TIMEOUT_S", 0.0)
    monkeypatch.setattr(buffer, "CALL_TIMEOUT_S", 0.01)
    log = AsyncLog(None)
    data = cast(Any, None)
    producer = ReplayProducer(cast(Any, SilentBuffer()), data, log, restore_limit_s=0.02)
    with pytest.raises(ClusterError, match=r"within 0\.01 s: the replay buffer; "):
        await producer.work()
    with pytest.raises(
        ClusterError,
        match=r"within 0\.02 s: the replay buffer's restore \(run\.startup_timeout_s\)",
    ):
        await producer.restore(None, 0)


async def test_weights_that_do_not_arrive_fail_the_update_by_key(tmp_path: Path) -> None:
    config = GeneratorPoolConfig(engine=TransformersEngine(), stall_timeout_s=0.05)
    job = GeneratorJob(
        model=tmp_path,
        source=Source.STUDENT,
        sampling=SamplingConfig(),
        end_token_ids=(1,),
        vocabulary_size=8,
        max_prompt_tokens=4,
        max_response_tokens=4,
        seed=0,
        device="cpu",
    )
    generator: Any = GeneratorActor(config, job)  # the class, whose annotations are a handle's
    with pytest.raises(TimeoutError, match=r"version 3 .* within rollout\.stall_timeout_s = 0\.05"):
        await generator.update_weights(make.weights(3, asyncio.sleep(60)), True)
