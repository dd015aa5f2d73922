"""The limits of a learner's calls to the orchestrator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from distillm_ray.cluster import orchestrator
from distillm_ray.cluster.orchestrator import OrchestratorClient
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
