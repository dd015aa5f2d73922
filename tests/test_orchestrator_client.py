"""The limits of a learner's calls to the orchestrator."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from distillm_ray.cluster import actors, orchestrator
from distillm_ray.cluster.actors import CALL_TIMEOUT_S
from distillm_ray.cluster.orchestrator import OrchestratorClient
from distillm_ray.errors import ClusterError
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


async def test_a_call_that_is_not_answered_ends_with_who_was_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(actors, "CALL_TIMEOUT_S", 0.01)
    with pytest.raises(ClusterError, match=r"^no reply within 0\.01 s: the log; "):
        await actors.reply(asyncio.sleep(60), "the log")
